//! What is in an image, for people and for programs.

use std::fmt::Write as _;
use std::time::{Duration, UNIX_EPOCH};

use indicatif::{BinaryBytes, HumanCount};
use serde_json::{Value, json};
use switchover_image::error::ImageError;
use switchover_image::reader::Image;
use switchover_runtime::state;
use switchover_wire::types::PageCount;

use crate::calendar::utc;

/// The root hash, in hexadecimal.
pub(crate) fn root(image: &Image) -> String {
    hex(&image.header().root)
}

/// The moment of the guest that it holds, in hexadecimal: what increments know their base by.
///
/// # Errors
/// When its sections cannot be encoded.
pub(crate) fn moment(image: &Image) -> Result<String, ImageError> {
    image.sections().moment().map(|moment| hex(&moment))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn saved_at(image: &Image) -> String {
    // A number that is no time of day any more is shown as the last one that is.
    let seconds = image.sections().origin.saved_at.min(253_402_300_799);
    utc(UNIX_EPOCH + Duration::from_secs(seconds))
}

/// The sections of the state by name, and their lengths; or why they are not known.
fn state_sections(image: &Image) -> Result<Vec<(String, usize)>, String> {
    let sections = state::sections(&image.sections().state).map_err(|error| error.to_string())?;
    Ok(sections.into_iter().map(|(section, contents)| (section.to_string(), contents.len())).collect())
}

/// What it is made of.
fn base(image: &Image) -> String {
    let Some(base) = image.base() else { return "none: it is complete by itself".to_owned() };
    let layers = image.layers().count();
    format!("{}, whose differences it holds; it takes {layers} images to restore this one", base.name)
}

/// For people.
pub(super) fn text(image: &Image) -> String {
    let (sections, header) = (image.sections(), image.header());
    let machine = &sections.machine;
    let size = |pages: PageCount| BinaryBytes(pages.bytes());
    let running = if sections.was_running { "running" } else { "paused" };
    let state = match state_sections(image) {
        Ok(parts) => parts.iter().map(|(name, length)| format!("{name} {length}")).collect::<Vec<_>>().join(", "),
        Err(reason) => reason,
    };
    let layout = if header.is_packed() { "packed, LZ4" } else { "in place" };
    let lines = [
        ("saved", format!("{} by {}, {running}", saved_at(image), sections.origin.version)),
        ("machine", format!("{}, {} vCPUs, {}", machine.architecture, machine.vcpus, size(image.pages()))),
        ("clock", format!("TSC at {} kHz", HumanCount(machine.tsc_khz.into()))),
        ("devices", machine.devices.join(", ")),
        (
            "memory",
            format!(
                "{} of {} pages are not zero, {}; {} stored, {layout}",
                HumanCount(image.present_pages().0),
                HumanCount(image.pages().0),
                size(image.present_pages()),
                BinaryBytes(image.stored_bytes()),
            ),
        ),
        ("state", format!("{} bytes: {state}", HumanCount(sections.state.len() as u64))),
        ("base", base(image)),
        ("root", root(image)),
    ];
    let mut text = format!("{}: an image of a guest\n", image.path().display());
    for (name, what) in lines {
        let _ = writeln!(text, "  {name:8} {what}");
    }
    text
}

/// For programs.
pub(super) fn json(image: &Image) -> String {
    let (sections, header) = (image.sections(), image.header());
    let state = match state_sections(image) {
        Ok(parts) => parts.into_iter().map(|(name, bytes)| json!({ "name": name, "bytes": bytes })).collect(),
        Err(_) => Value::Null,
    };
    let value = json!({
        "file": image.path().to_string_lossy(),
        "file-bytes": header.file_len(),
        "version": switchover_image::layout::VERSION,
        "packed": header.is_packed(),
        "base": image.base().map(|base| &base.name),
        "layers": image.layers().count(),
        "root": root(image),
        "moment": moment(image).ok(),
        "saved-at": saved_at(image),
        "saved-by": sections.origin.version,
        "was-running": sections.was_running,
        "machine": sections.machine,
        "memory": {
            "pages": image.pages().0,
            "present-pages": image.present_pages().0,
            "stored-bytes": image.stored_bytes(),
            "chunks": header.chunks(),
        },
        "state-bytes": sections.state.len(),
        "state-sections": state,
    });
    format!("{value:#}\n")
}
