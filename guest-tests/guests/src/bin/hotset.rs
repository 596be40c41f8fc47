//! Writes pages at random, most visits going to few of them.

#![no_std]
#![no_main]

switchover_guests::guest!(switchover_guests::workload::HotSet);
