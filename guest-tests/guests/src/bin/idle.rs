//! Sleeps between the ticks of a 1000 Hz timer, and writes one page a tick.

#![no_std]
#![no_main]

switchover_guests::guest!(switchover_guests::workload::Idle);
