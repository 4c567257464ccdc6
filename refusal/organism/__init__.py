"""The small chat model that is trained here as a positive control, and its grammar."""
