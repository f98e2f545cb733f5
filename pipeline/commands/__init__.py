"""The commands of the command line. What takes time to import is imported inside of them."""
