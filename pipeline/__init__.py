"""Thin Ray and storage around objdyn: one file per stage."""
