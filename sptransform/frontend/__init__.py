"""The functions that users call, and the wrappers between a module and its compiled graph."""
