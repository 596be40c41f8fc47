//! The table of docs/failures.md, row by row: what is left of a migration that something happens to, in each of its phases.
//!
//! A phase is reached exactly, because all that the two sides say to each other passes through the test's hands: what would end
//! the phase is held up until the blow has fallen.

mod cell;
mod cutting;
mod damaging;
mod killing;
mod lacking;
mod recovering;
mod witness;
