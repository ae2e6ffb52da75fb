"""Number formats. Pure: tensors in, tensors out; no files, no models, nothing printed."""
