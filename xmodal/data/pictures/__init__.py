"""Pictures: decoding, augmentation and resizing to the model's input, with their boxes."""
