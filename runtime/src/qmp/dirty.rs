//! `calc-dirty-rate`, `query-dirty-rate`, and the three commands around `vcpu-dirty-limit`.

use std::time::{Duration, UNIX_EPOCH};

use serde_json::{Value, json};

use super::arguments::Arguments;
use super::controller::{Controller, WrittenPagesMode};
use super::refusal::Refusal;
use crate::dirty_rate::{Method, Plan, Standing};

/// QEMU's bounds on how long a guest is watched, in milliseconds.
const CALC_TIME_MS: std::ops::RangeInclusive<i64> = 50..=60_000;
/// QEMU's bounds on pages sampled per GiB.
const SAMPLE_PAGES: std::ops::RangeInclusive<i64> = 128..=16_384;
/// QEMU's default of them.
const SAMPLE_PAGES_DEFAULT: i64 = 512;
const MIB: u64 = 1 << 20;

/// QEMU's `TimeUnit`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum TimeUnit {
    Second,
    Millisecond,
}

impl TimeUnit {
    fn take(arguments: &mut Arguments) -> Result<Self, Refusal> {
        match arguments.optional::<String>("calc-time-unit")?.as_deref() {
            None | Some("second") => Ok(Self::Second),
            Some("millisecond") => Ok(Self::Millisecond),
            Some(other) => Err(Refusal::not_accepted("calc-time-unit", other)),
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Second => "second",
            Self::Millisecond => "millisecond",
        }
    }

    const fn milliseconds(self) -> i64 {
        match self {
            Self::Second => 1000,
            Self::Millisecond => 1,
        }
    }
}

/// `calc-dirty-rate`: begins to measure.
///
/// # Errors
/// When the arguments are not right, or it cannot be measured now.
pub fn calc_dirty_rate(controller: &dyn Controller, mut arguments: Arguments) -> Result<Value, Refusal> {
    let time: i64 = arguments.required("calc-time")?;
    let unit = TimeUnit::take(&mut arguments)?;
    let samples: Option<i64> = arguments.optional("sample-pages")?;
    let mode: Option<String> = arguments.optional("mode")?;
    arguments.finish()?;
    if controller.dirty_rate().is_some_and(|last| last.standing == Standing::Measuring) {
        return Err(Refusal::generic("the dirty rate is already being measured."));
    }
    let time = time.saturating_mul(unit.milliseconds());
    if !CALC_TIME_MS.contains(&time) {
        let (least, most) = (CALC_TIME_MS.start(), CALC_TIME_MS.end());
        return Err(Refusal::generic(format_args!("Calculation time is out of range [{least}ms, {most}ms].")));
    }
    let method = method(controller, mode.as_deref())?;
    if samples.is_some() && method != Method::Sampling {
        return Err(Refusal::generic("sample-pages is used only in page-sampling mode"));
    }
    let samples = samples.unwrap_or(SAMPLE_PAGES_DEFAULT);
    if !SAMPLE_PAGES.contains(&samples) {
        let (least, most) = (SAMPLE_PAGES.start(), SAMPLE_PAGES.end());
        return Err(Refusal::generic(format_args!("sample-pages is out of range[{least}, {most}].")));
    }
    let plan =
        Plan { time: Duration::from_millis(time.unsigned_abs()), method, samples_per_gib: samples.unsigned_abs() };
    controller.measure_dirty_rate(plan).map_err(Refusal::generic).map(|()| json!({}))
}

/// The way that the mode called so means; a book is asked for by the name of the one that the machine keeps.
fn method(controller: &dyn Controller, mode: Option<&str>) -> Result<Method, Refusal> {
    match mode {
        None | Some("page-sampling") => Ok(Method::Sampling),
        Some(name) if name == controller.written_pages_mode().name() => Ok(Method::Book),
        Some(name @ ("dirty-bitmap" | "dirty-ring")) => {
            Err(Refusal::generic(format_args!("mode {name} is not enabled, use other method instead.")))
        }
        Some(other) => Err(Refusal::not_accepted("mode", other)),
    }
}

/// `query-dirty-rate`: QEMU's `DirtyRateInfo`. Rates are MiB a second, rounded down.
///
/// # Errors
/// When the arguments are not right.
pub fn query_dirty_rate(controller: &dyn Controller, mut arguments: Arguments) -> Result<Value, Refusal> {
    let unit = TimeUnit::take(&mut arguments)?;
    arguments.finish()?;
    let Some(last) = controller.dirty_rate() else {
        return Ok(json!({
            "status": "unstarted", "start-time": 0, "calc-time": 0, "calc-time-unit": unit.name(), "sample-pages": 0,
            "mode": "page-sampling",
        }));
    };
    let sampled = last.plan.method == Method::Sampling;
    let mut info = json!({
        "status": match last.standing {
            Standing::Interrupted => "unstarted",
            Standing::Measuring => "measuring",
            Standing::Measured { .. } => "measured",
        },
        "start-time": last.started.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
        "calc-time": last.plan.time.as_millis() / u128::from(unit.milliseconds().unsigned_abs()),
        "calc-time-unit": unit.name(),
        "sample-pages": if sampled { last.plan.samples_per_gib } else { 0 },
        "mode": if sampled { "page-sampling" } else { controller.written_pages_mode().name() },
    });
    if let Standing::Measured { bytes_per_second } = last.standing {
        info["dirty-rate"] = json!(bytes_per_second / MIB);
    }
    Ok(info)
}

/// `set-vcpu-dirty-limit`: MiB a second for each vCPU; 0 lifts the limit.
///
/// # Errors
/// When the arguments are not right, or the machine cannot.
pub fn set_vcpu_dirty_limit(controller: &dyn Controller, mut arguments: Arguments) -> Result<Value, Refusal> {
    let index: Option<i64> = arguments.optional("cpu-index")?;
    let rate: u64 = arguments.required("dirty-rate")?;
    arguments.finish()?;
    check_index(controller, index)?;
    let done = match rate {
        0 => controller.limit_dirty_rate(None),
        rate => controller.limit_dirty_rate(Some(rate.saturating_mul(MIB))),
    };
    done.map_err(Refusal::generic).map(|()| json!({}))
}

/// `cancel-vcpu-dirty-limit`. No limit is no error.
///
/// # Errors
/// When the arguments are not right, or a migration holds the limit.
pub fn cancel_vcpu_dirty_limit(controller: &dyn Controller, mut arguments: Arguments) -> Result<Value, Refusal> {
    let index: Option<i64> = arguments.optional("cpu-index")?;
    arguments.finish()?;
    check_index(controller, index)?;
    controller.limit_dirty_rate(None).map_err(Refusal::generic).map(|()| json!({}))
}

/// `query-vcpu-dirty-limit`: a list with each vCPU, or none where there is no limit. Where the machine cannot tell vCPUs
/// apart, `current-rate` is their mean.
///
/// # Errors
/// When there are arguments.
pub fn query_vcpu_dirty_limit(controller: &dyn Controller, arguments: Arguments) -> Result<Value, Refusal> {
    arguments.finish()?;
    let Some(limit) = controller.dirty_limit() else { return Ok(json!([])) };
    let vcpus = controller.vcpus();
    let rates = controller.vcpu_dirty_rates().unwrap_or_default();
    let mean = limit.written_per_second / u64::from(vcpus.max(1));
    let each = |(index, rate): (u32, Option<u64>)| {
        json!({
            "cpu-index": index,
            "limit-rate": limit.bytes_per_second / MIB,
            "current-rate": rate.unwrap_or(mean) / MIB,
        })
    };
    let rates = rates.into_iter().map(Some).chain(std::iter::repeat(None));
    Ok((0..vcpus).zip(rates).map(each).collect())
}

/// All vCPUs are held to one limit.
fn check_index(controller: &dyn Controller, index: Option<i64>) -> Result<(), Refusal> {
    let vcpus = i64::from(controller.vcpus());
    match index {
        None => Ok(()),
        Some(index) if !(0..vcpus).contains(&index) => Err(Refusal::generic("incorrect cpu index specified")),
        Some(_) if vcpus == 1 => Ok(()),
        Some(_) => {
            Err(Refusal::generic("all vCPUs of this machine are held to one limit: leave 'cpu-index' out to set it"))
        }
    }
}

impl WrittenPagesMode {
    /// QEMU's name for it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bitmap => "dirty-bitmap",
            Self::Ring => "dirty-ring",
        }
    }
}
