"""Images: where they come from, how they are drawn, augmented and brought to the device."""
