//! Rounds over dirty bitmaps.
