//! Memory that is sent while the guest still writes it.
//!
//! Pre-copy sends memory in *rounds*: each sends the pages that were written since the round before. What is written
//! faster than it can be sent is left for the handoff. This crate runs the rounds on the source and keeps their books; when
//! to stop is decided above it (`hybrid`'s monitor), and who wrote what is told by the machine.
//!
//! ```text
//!   Machine ── DirtyLog ──▶ round: work list ──spans──▶ lane threads ──▶ bulk lanes ──▶ destination
//!                  ▲            │                        │ rearm, find zeros, pack          │
//!                  └── rearm ───┼────────────────────────┘                                  │
//!                               │             books: what is under way ◀── receipts ────────┘
//!                               └── heat ──▶ push order of post-copy
//! ```
//!
//! - [`dirty`]: what a machine must tell, and in which order it must be asked.
//! - [`rounds`]: the lanes' threads, and the books of what is under way.
//! - [`pack`]: how a lane sends a page in fewer bytes, where that is faster.
//! - [`heat`]: which pages are likely to be written, and so wanted, next.
//! - [`throttle`]: slowing the guest down, for those who have nothing but pre-copy.
//! - [`snapshot`]: pages as they are at one moment, of a guest that runs on.
//! - [`bitmap`]: one bit a page, walked a word at a time.
//!
//! # What it promises
//! - *Never two versions of a page under way.* A page is sent again only when its last frame was acknowledged.
//! - *Nothing is forgotten.* What the destination lacks, or has in an old version, is at any moment what the machine has
//!   noted and what is under way: their union is what the handoff leaves to post-copy.
//! - *References hold.* A difference, or "the same as page X", refers only to what the destination has acknowledged and
//!   will not replace before it has used it.

pub mod bitmap;
pub mod dirty;
pub mod heat;
mod live;
pub mod pack;
pub mod rounds;
pub mod snapshot;
mod sync;
pub mod throttle;
