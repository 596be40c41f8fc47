//! What crosses the network between the two sides of a migration.
//!
//! A *source* moves a guest to a *destination* over several connections, each with one job and called a *lane*: one
//! `control` lane for what the two say to each other, `fault` lanes for the pages that the guest waits for, `bulk`
//! lanes for the pages that are pushed. This crate opens the connections, introduces the two sides to each other,
//! and turns what they say into bytes and back. It knows neither KVM nor userfaultfd, and decides nothing: when to
//! hand off, what to send and what to believe of the guest are the business of the crates above it.
//!
//! ```text
//!    source                                                            destination
//!
//!    Socket::connect(Address)                            Listener::bind(Address)
//!          |                                                   | accept
//!          v                                                   v
//!      +---------+   Hello: session, lane, machine  ->    +---------+
//!      | Socket  |   <- Welcome | Refused: a sentence     | Socket  |      handshake, description
//!      +---------+                                        +---------+
//!       |   |   |                                          |   |   |
//!       |   |   +--- control:  ControlMessage  <--------> -+   |   |      message (postcard, CRC-32), Ring
//!       |   |                                                  |   |
//!       |   +------- fault:    <- FaultRequest      -----------+   |      frame::fault, EventRing
//!       |                      FaultReply + page ->                |
//!       |                                                          |
//!       +----------- bulk:     BulkFrame + pages -> ---------------+      frame::bulk, Ring
//! ```
//!
//! What it promises:
//!
//! - *Nothing from the network is believed.* Lengths are bounded before memory is allocated for them; page numbers,
//!   masks and counts are checked against the size of RAM before they leave [`frame`]; whatever is wrong ends in an
//!   error that names the frame or the lane, never in a panic.
//! - *A bit that was flipped on the way is noticed* before it counts: every header carries a checksum, and so does every
//!   payload of a lane that nothing below protects ([`checksum`]).
//! - *What does not match is refused before the guest is touched*, with a sentence that says what differs
//!   ([`description`], [`handshake`]).
//! - *Memory that is given to the kernel stays until the kernel is done with it* ([`ring`], the only unsafe module
//!   but for one system call in [`clock`]).
//! - *Nobody waits for ever against their will.* Connecting and the handshake have deadlines;
//!   [`socket::Socket::shutdown`] and [`socket::Listener::close`] wake whoever is blocked.
//! - *A closed connection is an error*, whatever was read before it.

pub mod address;
pub mod bitmap;
pub mod checksum;
pub mod clock;
pub mod counters;
pub mod description;
pub mod encoding;
pub mod frame;
pub mod handshake;
pub mod message;
pub mod ring;
pub mod socket;
pub mod tls;
pub mod types;
