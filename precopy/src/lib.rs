//! What pre-copy knows about a guest's pages: which are to be sent, and which are likely to be written again.
//!
//! Pre-copy sends memory while the guest runs on the source, in *rounds*: each sends the pages that were dirtied since
//! the one before. This crate holds the bookkeeping of that, apart from sockets and machines. What is here now is the
//! foundation that rounds and heat are built on:
//!
//! - [`bitmap`]: one bit a page, walked a word at a time, because a bitmap of a large guest is looked at inside the
//!   blackout.
//!
//! A migration in this version hands off before any page is sent, so no round runs yet; the rounds themselves, the heat
//! of pages and the order that heat gives to the push belong here.
//!
//! ```text
//!   Machine ──dirty bitmap──▶ round ──pages──▶ bulk lanes
//!                               └──heat──▶ push order of post-copy
//! ```

pub mod bitmap;
pub mod dirty;
pub mod heat;
pub mod pack;
pub mod throttle;
