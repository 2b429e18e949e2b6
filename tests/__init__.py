"""The tests of ipo_ext, a folder for each subject: docs/dev/testing.md says what goes where."""
