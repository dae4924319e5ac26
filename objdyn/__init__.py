"""objdyn: learn, without labels, which objects are in a video and how they move."""
