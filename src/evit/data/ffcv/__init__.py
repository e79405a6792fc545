"""The fast path: FFCV files, decoded and augmented in threads of compiled code."""
