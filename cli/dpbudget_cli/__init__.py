"""The command ``dpbudget``: one file a command, loaded when it is called."""
