"""Curation: cutting, scoring, captioning and filtering of clips, part by part, under Beam."""
