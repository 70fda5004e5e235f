"""Downloads of public releases: resumed, checked, written aside."""
