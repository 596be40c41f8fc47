//! The sections of an image: everything but memory.
//!
//! ```text
//! name's length 2 · 0 2 · payload's length 4 · name · payload │ …
//! ```
//!
//! All numbers are little-endian. The sections are those of [`Sections`], in that order, each once; of an increment, its [`Base`] behind
//! them.

use std::path::Path;

use serde::{Deserialize, Serialize};
use switchover_wire::description::MachineDescription;
use switchover_wire::message::MAX_MESSAGE;
use switchover_wire::types::PageIndex;

use crate::base::{Base, Moment};
use crate::error::ImageError;

const ENTRY_HEADER: usize = 8;

/// The sections' names, in their order.
const NAMES: [&str; 5] = ["machine", "state", "running", "first-pages", "origin"];
/// The name of the one behind them.
const BASE: &str = "base";

/// The most first pages that are kept: those of the most vCPUs that there can be.
const MOST_FIRST_PAGES: usize = 1 << 16;
/// The longest name of a program's version.
const LONGEST_VERSION: usize = 64;

/// All that an image holds of a guest beside its memory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Sections {
    /// Section `machine`: what a machine must be that the guest is restored in, as the handshake tells it (postcard).
    pub machine: MachineDescription,
    /// Section `state`: the state of vCPUs and devices, as a session sends it. Its content is no business of this crate.
    pub state: Vec<u8>,
    /// Section `running`: whether the guest was running. One that its user had paused is restored paused. One byte, 0 or 1.
    pub was_running: bool,
    /// Section `first-pages`: the pages that the guest's first instructions want, most urgent first (postcard).
    pub first_pages: Vec<PageIndex>,
    /// Section `origin`: who wrote it, and when (postcard).
    pub origin: Origin,
}

/// Where an image comes from: for people, nothing depends on it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Origin {
    /// The version of the program that wrote it.
    pub version: String,
    /// When the guest was paused, in seconds since 1970 by the host's clock.
    pub saved_at: u64,
}

impl Sections {
    /// As they stand in the file.
    ///
    /// # Errors
    /// When one is too large.
    pub fn encode(&self) -> Result<Vec<u8>, ImageError> {
        let limits = [
            ("the state", self.state.len(), MAX_MESSAGE),
            ("the list of first pages", self.first_pages.len(), MOST_FIRST_PAGES),
            ("the version of the program", self.origin.version.len(), LONGEST_VERSION),
        ];
        if let Some((what, got, most)) = limits.into_iter().find(|(_, got, most)| got > most) {
            return Err(ImageError::TooLarge { what, got, most });
        }
        // What fits into memory has a postcard form; an empty one would be refused by whoever reads it.
        let machine = postcard::to_stdvec(&self.machine).unwrap_or_default();
        let first_pages = postcard::to_stdvec(&self.first_pages).unwrap_or_default();
        let origin = postcard::to_stdvec(&self.origin).unwrap_or_default();
        let running = [u8::from(self.was_running)];
        let payloads = [&machine[..], &self.state, &running, &first_pages, &origin];
        let mut bytes = Vec::with_capacity(self.state.len() + machine.len() + 4096);
        for (name, payload) in NAMES.iter().zip(payloads) {
            append(&mut bytes, name, payload)?;
        }
        Ok(bytes)
    }

    /// The same, of an image with a base.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_on(&self, base: Option<&Base>) -> Result<Vec<u8>, ImageError> {
        let mut bytes = self.encode()?;
        if let Some(base) = base {
            append(&mut bytes, BASE, &base.encode())?;
        }
        Ok(bytes)
    }

    /// The moment of the guest that they are of.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn moment(&self) -> Result<Moment, ImageError> {
        Ok(*blake3::hash(&self.encode()?).as_bytes())
    }

    /// Reads the sections of the image `path`, which lie there from byte `at` on. One with a base is an `increment`.
    ///
    /// # Errors
    /// When they are not those of an image of so many pages, or one of them makes no sense.
    pub fn decode(
        bytes: &[u8],
        path: &Path,
        at: u64,
        pages: u64,
        increment: bool,
    ) -> Result<(Self, Option<Base>), ImageError> {
        let mut rest = Rest { path, at, bytes };
        let mut payloads = [(0, &bytes[..0]); NAMES.len()];
        for (place, name) in payloads.iter_mut().zip(NAMES) {
            *place = rest.section(name)?;
        }
        let base = if increment {
            let (at, payload) = rest.section(BASE)?;
            let base = Base::decode(payload).ok_or_else(|| {
                let got = format!("{} bytes that are no moment and name", payload.len());
                Rest { path, at, bytes: &[] }.wrong("the section `base`", got, "a moment and the name of a file")
            });
            Some(base?)
        } else {
            None
        };
        if !rest.bytes.is_empty() {
            return Err(rest.wrong("what follows the last section", format!("{} bytes", rest.bytes.len()), "nothing"));
        }
        let wrong = |(at, _): (u64, &[u8]), what: &str, got: String, allowed: &str| {
            Rest { path, at, bytes: &[] }.wrong(what, got, allowed)
        };
        let [machine_bytes, state, running, first_bytes, origin_bytes] = payloads;
        let machine: MachineDescription = postcard_of(machine_bytes.1)
            .map_err(|error| wrong(machine_bytes, "the section `machine`", error, "a machine's description"))?;
        machine.check_bounds().map_err(|error| {
            wrong(machine_bytes, "the section `machine`", error.to_string(), "a machine that can be")
        })?;
        if machine.pages().0 != pages {
            let got = format!("of a machine with {}", machine.pages());
            return Err(wrong(machine_bytes, "the section `machine`", got, &format!("one with {pages}")));
        }
        let was_running = match running.1 {
            [0] => false,
            [1] => true,
            other => return Err(wrong(running, "the section `running`", format!("{other:?}"), "[0] or [1]")),
        };
        let first_pages: Vec<PageIndex> = postcard_of(first_bytes.1)
            .map_err(|error| wrong(first_bytes, "the section `first-pages`", error, "a list of pages"))?;
        if let Some(page) = first_pages.iter().find(|page| page.0 >= pages) {
            return Err(wrong(first_bytes, "a first page", page.to_string(), &format!("a page below {pages:#x}")));
        }
        if first_pages.len() > MOST_FIRST_PAGES {
            let got = first_pages.len().to_string();
            return Err(wrong(first_bytes, "the number of first pages", got, &format!("at most {MOST_FIRST_PAGES}")));
        }
        let origin: Origin = postcard_of(origin_bytes.1)
            .map_err(|error| wrong(origin_bytes, "the section `origin`", error, "a version and a time"))?;
        // It is shown to people as it stands.
        if origin.version.len() > LONGEST_VERSION || origin.version.contains(char::is_control) {
            let got = format!("{} bytes", origin.version.len());
            return Err(wrong(origin_bytes, "the version in the section `origin`", got, "a short line"));
        }
        Ok((Self { machine, state: state.1.to_vec(), was_running, first_pages, origin }, base))
    }
}

fn append(bytes: &mut Vec<u8>, name: &str, payload: &[u8]) -> Result<(), ImageError> {
    let most = MAX_MESSAGE;
    let length = u32::try_from(payload.len()).ok().filter(|_| payload.len() <= most);
    let length = length.ok_or(ImageError::TooLarge { what: "a section", got: payload.len(), most })?;
    bytes.extend(u16::try_from(name.len()).unwrap_or(0).to_le_bytes());
    bytes.extend([0, 0]);
    bytes.extend(length.to_le_bytes());
    bytes.extend(name.as_bytes());
    bytes.extend(payload);
    Ok(())
}

/// A value that fills `bytes` exactly.
fn postcard_of<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, String> {
    match postcard::take_from_bytes(bytes) {
        Ok((value, [])) => Ok(value),
        Ok((_, rest)) => Err(format!("followed by {} more bytes", rest.len())),
        Err(error) => Err(format!("what postcard cannot read ({error})")),
    }
}

struct Rest<'a> {
    path: &'a Path,
    /// Where in the file `bytes` begins.
    at: u64,
    bytes: &'a [u8],
}

impl<'a> Rest<'a> {
    fn wrong(&self, what: &str, got: String, allowed: &str) -> ImageError {
        ImageError::Field {
            path: self.path.to_owned(),
            offset: self.at,
            what: what.to_owned(),
            got,
            allowed: allowed.to_owned(),
        }
    }

    /// The section `name`, which must come next, and where its payload is.
    fn section(&mut self, name: &str) -> Result<(u64, &'a [u8]), ImageError> {
        let what = format!("the section that should be `{name}`");
        let cut_short =
            |rest: &Self| rest.wrong(&what, format!("cut short after {} bytes", rest.bytes.len()), "a whole one");
        let Some((head, behind)) = self.bytes.split_first_chunk::<ENTRY_HEADER>() else { return Err(cut_short(self)) };
        let [low, high, zero, zero_too, length @ ..] = *head;
        let (name_len, length) = (usize::from(u16::from_le_bytes([low, high])), u32::from_le_bytes(length));
        let found = behind.get(..name_len).ok_or_else(|| cut_short(self))?;
        if found != name.as_bytes() {
            return Err(self.wrong(&what, format!("called {:?}", String::from_utf8_lossy(found)), "that one"));
        }
        if [zero, zero_too] != [0, 0] {
            return Err(self.wrong(
                &what,
                "with other bytes than 0 behind the length of its name".to_owned(),
                "no such",
            ));
        }
        let payload = usize::try_from(length).ok().and_then(|length| behind[name_len..].get(..length));
        let payload = payload.filter(|payload| payload.len() <= MAX_MESSAGE).ok_or_else(|| cut_short(self))?;
        let start = self.at + (ENTRY_HEADER + name_len) as u64;
        self.bytes = &behind[name_len + payload.len()..];
        self.at = start + payload.len() as u64;
        Ok((start, payload))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use switchover_wire::description::RamRegion;
    use switchover_wire::types::PageCount;

    use super::*;

    /// The sections of a small guest with so many pages.
    pub(crate) fn sample(pages: u64) -> Sections {
        Sections {
            machine: MachineDescription {
                architecture: "x86_64".to_owned(),
                page_size: 4096,
                ram: vec![RamRegion { guest_address: 0, pages: PageCount(pages) }],
                vcpus: 1,
                cpuid: Vec::new(),
                xcr0: 7,
                msrs: vec![0x10],
                tsc_khz: 2_000_000,
                devices: vec!["serial".to_owned()],
                state_version: 1,
            },
            state: b"state of vCPUs and devices".to_vec(),
            was_running: true,
            first_pages: vec![PageIndex(1), PageIndex(0)],
            origin: Origin { version: "switchover 0.1.0".to_owned(), saved_at: 1_764_000_000 },
        }
    }

    #[test]
    fn sections_are_read_as_they_were_written() {
        let sections = sample(9);
        let bytes = sections.encode().unwrap();
        assert_eq!(Sections::decode(&bytes, Path::new("f"), 100, 9, false).unwrap(), (sections.clone(), None));
        let base = Base { moment: [3; 32], name: "b.image".to_owned() };
        let bytes = sections.encode_on(Some(&base)).unwrap();
        assert!(Sections::decode(&bytes, Path::new("f"), 100, 9, false).is_err());
        assert_eq!(Sections::decode(&bytes, Path::new("f"), 100, 9, true).unwrap(), (sections, Some(base)));
    }

    #[test]
    fn what_is_wrong_is_said_with_its_place() {
        let told = |change: &dyn Fn(&mut Vec<u8>), pages| {
            let mut bytes = sample(9).encode().unwrap();
            change(&mut bytes);
            Sections::decode(&bytes, Path::new("f"), 0x1000, pages, false).unwrap_err().to_string()
        };
        let at = |bytes: &[u8], name: &[u8]| bytes.windows(name.len()).position(|part| part == name).unwrap();
        assert!(told(&|bytes| bytes.push(0), 9).contains("what follows the last section is 1 bytes"));
        assert!(told(&|_| (), 10).contains("a machine with 9 pages, where one with 10"));
        assert!(
            told(&|bytes| bytes[8] = b'M', 9)
                .contains("at byte 0x1000, the section that should be `machine` is called")
        );
        let state = told(
            &|bytes| {
                let name = at(bytes, b"running");
                bytes[name + 7] = 2;
            },
            9,
        );
        assert!(state.contains("the section `running` is [2], where [0] or [1]"), "{state}");
        let end = sample(9).encode().unwrap().len();
        for length in 0..end {
            let error = told(&|bytes| bytes.truncate(length), 9);
            assert!(error.contains("cut short") || error.contains("postcard"), "{length}: {error}");
        }
    }
}
