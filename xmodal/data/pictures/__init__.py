"""Pictures: from any file to pixels of the model's input, and where boxes lie in them."""
