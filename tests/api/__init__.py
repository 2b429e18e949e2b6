"""What a user meets: settings, errors, diagnosis, the demo."""
