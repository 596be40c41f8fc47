//! The loop that every vCPU ends in: visit, measure, report.

use core::hint::spin_loop;

use crate::clock::Clock;
use crate::cpu::{halt, tsc};
use crate::meter::METERS;
use crate::pages::Part;
use crate::params::Params;
use crate::report::Reporter;
use crate::rng::Rng;
use crate::workload::Workload;

/// Visits pages for ever. `start` is the time from which the first gap counts; the vCPU with a reporter prints.
pub fn work<W: Workload>(
    cpu: usize,
    params: &Params,
    clock: Clock,
    part: Part,
    mut reporter: Option<&mut Reporter>,
    start: u64,
) -> ! {
    let mut workload = W::new(params, part.len());
    let mut rng = Rng::new(params.seed.wrapping_add(cpu as u64));
    let meter = &METERS[cpu];
    let pace = clock.ticks_of_ns(params.pace_ns);
    let mut until_damage = if cpu == 0 { params.corrupt } else { 0 };
    let mut last = start;
    // The last reading before a visit: whatever the guest did on its own account lies before it.
    let mut before = start;
    loop {
        let random = rng.next();
        let choice = workload.next(random);
        if until_damage > 0 {
            until_damage -= 1;
            if until_damage == 0 {
                part.damage(choice.page, params.corrupt, random);
            }
        }
        if let Err(corruption) = part.visit(choice.page, choice.write, random) {
            meter.corrupt(&corruption);
        }

        // The one reading of the clock. It may run ahead of the visit's loads, in which case the time that they take
        // belongs to the next gap: nothing is lost.
        let now = tsc();
        meter.visit(now.wrapping_sub(last));
        if params.fine {
            meter.visit_took(now.wrapping_sub(before));
        }
        (last, before) = (now, now);

        if let Some(reporter) = &mut reporter
            && reporter.after_visit(now)
            && params.fine
        {
            before = tsc();
        }
        if W::SLEEPS {
            loop {
                while reporter.as_mut().is_some_and(|reporter| reporter.step()) {}
                halt();
                before = tsc();
                if before.wrapping_sub(last) >= pace {
                    break;
                }
            }
        } else if pace > 0 {
            loop {
                before = tsc();
                if before.wrapping_sub(last) >= pace {
                    break;
                }
                if !reporter.as_mut().is_some_and(|reporter| reporter.step()) {
                    spin_loop();
                }
            }
        }
    }
}
