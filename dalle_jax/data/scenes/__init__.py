"""Procedural scenes of colored shapes with captions: records, layout, captions and rendering."""
