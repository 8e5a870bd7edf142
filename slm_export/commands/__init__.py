"""What each command does. Imported only once a command is known to run."""
