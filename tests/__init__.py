"""The tests of ipo_ext, a folder for each subject: docs/testing.md says what goes where."""
