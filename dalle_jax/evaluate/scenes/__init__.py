"""Verification of images of procedural scenes by image analysis: regions, masks, shapes, verdicts."""
