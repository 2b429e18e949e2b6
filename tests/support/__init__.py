"""What tests share: backends, the arguments of calls, and when two results are equal."""
