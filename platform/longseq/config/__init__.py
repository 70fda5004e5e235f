"""Configuration: the keys, their files, and what is said of a wrong one."""
