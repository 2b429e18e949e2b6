"""What a user meets: settings, errors, diagnostics, the demo."""
