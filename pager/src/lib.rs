//! Memory that arrives while the guest runs.
//!
//! The destination of a post-copy migration starts its vCPUs on memory that is not there yet. This crate brings it:
//! userfaultfd stops whoever touches an absent page, the *fault thread* asks the source for it over the `fault` lane,
//! and *bulk threads* receive everything else, unasked, over `bulk` lanes. The source's half answers and pushes.
//!
//! ```text
//!          source                                            destination
//!   ┌────────────────────┐   fault lane: 24-byte requests   ┌─────────────────────┐
//!   │ FaultServer ◀──────┼──────────────────────────────────┼── FaultService ◀──┐ │
//!   │      └─────────────┼── header + page ─────────────────┼──▶ alias          │ │ userfaultfd
//!   │ Pusher(s) ─────────┼── bulk lanes: 64-page chunks ────┼──▶ BulkReceiver(s)│ │
//!   │   order: hints,    │                                  │     └─▶ alias     │ │
//!   │   faults, sweep    │                                  │  CONTINUE ──▶ guest mapping ──▶ vCPUs
//!   └────────────────────┘                                  └─────────────────────┘
//! ```
//!
//! Faults may be divided among several fault lanes: RAM is cut into stripes ([`stripes`]), and each lane has a fault thread and a
//! userfaultfd for its own.
//!
//! Read [`destination`] from the top, then `destination/fault.rs`: that file is the fault path.
//!
//! # What it promises
//! - *No wrong byte.* Every page has one state, changed in one place ([`state::PageStates`]). Bytes are received into
//!   the alias only under a won claim, and never into a page that the guest may have seen.
//! - *No zeros for what is missing.* The userfaultfd is closed only when memory is complete, or nobody can run on it.
//! - *No trust.* Frames are checked against RAM's size before any page is touched.
//! - *No allocation and no lock across a system call* on the fault path.
//!
//! It knows nothing of KVM: RAM is a memfd mapped twice ([`ram::Ram`]), and lanes are sockets.

pub mod collapse;
pub mod cpu;
pub mod destination;
pub mod digest;
pub mod lane;
pub mod pace;
pub mod ram;
pub mod runs;
pub mod sent;
pub mod source;
pub mod state;
pub mod stats;
pub mod stripes;
mod sync;
pub mod trace;
pub mod uffd;
mod wait;
mod words;
pub mod zero;
