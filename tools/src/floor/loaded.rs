//! The floor beside a drain: the same round trips while a bulk stream and a vCPU want the processors too.
//!
//! ```text
//!   fault     the guest works, then faults ──▶ handler: CONTINUE                 beside the stream
//!   tcp       16 bytes ──▶ 4 KiB back                                            beside the stream and a busy vCPU
//!   remote    the guest works, then faults ──▶ handler: 16 bytes ──▶ 4 KiB ──▶ CONTINUE   beside the stream
//! ```
//!
//! Where a guest faults it is itself the busy vCPU: a vCPU that waits for a page leaves its processor to those who bring it, and a
//! second one, that never waits, would make the floor of a one-vCPU guest too high. It works [`WORK_NS`] between two faults,
//! about as long as a fault takes, so that it is away about half the time. A request alone blocks no vCPU, so there a second
//! one is busy all the time.

use std::time::Duration;

use super::fault::{Touches, Vcpu, no_op, remote};
use super::loaded_report::{Loaded, LoadedReport, LoadedWays, StreamRate};
use super::report::Measured;
use super::stream::{Stream, bits_per_second};
use super::{FloorError, Percentiles, Samples, Way, busy, request};

/// How long the guest works between two faults.
const WORK_NS: u64 = 100_000;
/// Pages of a batch: where threads spin in each other's way a fault takes milliseconds, and a batch is not cut short.
const PAGES: usize = 32;
/// Connections whose rates are measured, alone and not.
const CONNECTIONS: [u32; 2] = [1, 2];
/// Before a rate is read, buffers fill and congestion windows open.
const SETTLE: u32 = 4;

/// Measurements that share the time: three parts, each waited for in two ways, and the streams.
pub const PARTS: u32 = 3 * 2 + 2 * 2;

/// Measures every part for about `each`. The stream beside them carries `limit` bits a second, or what it can.
pub fn measure(vcpu: Vcpu, each: Duration, limit: Option<u64>) -> LoadedReport {
    let stream = Stream::new(1, limit);
    let beside = |work: &dyn Fn(Way) -> Result<Samples, FloorError>, way| match &stream {
        Ok(stream) => loaded(stream, || work(way)),
        Err(error) => Loaded { round: missing(error), stream_bit_s: None },
    };
    let ways = |work: &dyn Fn(Way) -> Result<Samples, FloorError>| LoadedWays {
        sleeping: beside(work, Way::Sleeping),
        spinning: beside(work, Way::Spinning),
    };
    let touches = Touches { by: vcpu, pages: PAGES, work_ns: WORK_NS };
    let fault = ways(&|way| no_op(touches, way, each));
    let tcp = ways(&|way| busy::beside(vcpu, || request::over_tcp(way, each)));
    let remote = ways(&|way| remote(touches, way, each));
    drop(stream);
    LoadedReport::new(vcpu.name(), WORK_NS, limit, [fault, tcp, remote], rates(vcpu, each))
}

/// One part, and what the stream beside it carried.
fn loaded(stream: &Stream, work: impl FnOnce() -> Result<Samples, FloorError>) -> Loaded {
    let measured = stream.beside(|carried| {
        let before = carried.now();
        let samples = work()?;
        Ok((samples, bits_per_second(before, carried.now())))
    });
    match measured {
        Ok((samples, bit_s)) => {
            Loaded { round: Measured::Round(Percentiles::of(&samples.histogram)), stream_bit_s: Some(bit_s) }
        }
        Err(error) => Loaded { round: missing(&error), stream_bit_s: None },
    }
}

fn missing(error: &FloorError) -> Measured {
    Measured::Missing { unavailable: error.to_string() }
}

/// What streams carry that nothing bounds: alone, and beside a vCPU that is always busy. Those that fail are left out.
fn rates(vcpu: Vcpu, each: Duration) -> Vec<StreamRate> {
    let mut rates = Vec::new();
    for connections in CONNECTIONS {
        let Ok(stream) = Stream::new(connections as usize, None) else { continue };
        let rate = || {
            stream.beside(|carried| {
                std::thread::sleep(each / SETTLE);
                let before = carried.now();
                std::thread::sleep(each);
                Ok(bits_per_second(before, carried.now()))
            })
        };
        for (beside, measured) in [("nothing", rate()), (vcpu.name(), busy::beside(vcpu, rate))] {
            if let Ok(bit_s) = measured {
                rates.push(StreamRate { connections, beside: beside.to_owned(), bit_s });
            }
        }
    }
    rates
}
