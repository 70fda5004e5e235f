"""One parser a format: files, URLs and Hub datasets become records of tokens."""
