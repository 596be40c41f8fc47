//! Writes pages chosen uniformly at random.

#![no_std]
#![no_main]

switchover_guests::guest!(switchover_guests::workload::Random);
