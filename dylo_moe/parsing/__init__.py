"""What all commands share: flags declared once, help, parsers, recipes, and how a command ends."""
