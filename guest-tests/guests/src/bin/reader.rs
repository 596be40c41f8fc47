//! Reads pages at random and writes a few of them.

#![no_std]
#![no_main]

switchover_guests::guest!(switchover_guests::workload::Reader);
