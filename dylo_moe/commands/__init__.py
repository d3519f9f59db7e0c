"""The commands of `dylora`: each one is a package, beside the modules that they share."""
