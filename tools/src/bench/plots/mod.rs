//! The report's pictures, each a string of SVG to be put into the page.
//!
//! Colours are written as fixed stand-ins (see [`canvas::Ink`]) that the page's style sheet maps to its light and dark
//! palettes, so that one picture suits both.

pub mod beside;
pub mod canvas;
pub mod latency;
pub mod progress;
pub mod rates;
pub mod ticks;
pub mod timeline;
