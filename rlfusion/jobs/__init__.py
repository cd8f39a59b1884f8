"""One file a command, and the parts that commands share."""
