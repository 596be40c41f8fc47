//! A guest at rest: its memory and its state in one file, which it can be restored from.
//!
//! ```text
//!    memfd of a paused guest                                             memfd of a machine without a guest
//!      │ pread, several threads                                                    ▲ pwrite, several threads
//!      ▼                                                                           │
//!    chunk: which pages are not zero, their BLAKE3 hash                  chunk: its hash compared
//!      │ pwrite at the chunk's place                                               ▲ pread
//!      ▼                                                                           │
//!    .NAME.….partial ── table of contents, header, fdatasync, rename ──▶ NAME ── header, table, root hash
//!    writer.rs, partial.rs                                                     reader.rs
//! ```
//!
//! `docs/image.md` has the format to the byte; [`layout`] is that page as code.
//!
//! What it promises:
//!
//! - *An image is whole, or it is not there.* It is written under another name in the same folder, made durable, and renamed. Who
//!   is killed meanwhile leaves the image that was there before.
//! - *Nothing of a file is believed.* Lengths are bounded before memory is allocated for them; whatever is wrong is an error that
//!   names the file, the part of it and the offset.
//! - *No page is given out that is not what was written.* A chunk is compared with its hash before any page of it is used, and the
//!   hashes with the root hash before any of them is. There is no secret in it: whoever may write the file may make another one.
//! - *Zero pages take no room.* What is zero is a bit in a bitmap, and a hole in the file.
//!
//! It knows nothing of KVM, and nothing of what is in the guest's state.

pub mod base;
mod buffer;
mod chunk;
mod compare;
mod crew;
pub mod error;
pub mod folder;
pub mod layout;
mod leaves;
pub mod merge;
mod partial;
pub mod reader;
pub mod sections;
pub mod working_set;
pub mod writer;

pub use compare::{Differences, differences};
pub use crew::{Tally, threads_for};
