//! What changed between two versions of a page.

use super::Page;

/// Bytes compared at once: long enough that equal stretches cost next to nothing, short enough to be done in registers.
const STRIDE: usize = 64;

/// Bytes compared to find where in a stride something changed.
const WORD: usize = 8;

/// Unchanged bytes between two changes that are cheaper sent along than skipped: a run of its own costs as many.
const WORTH_JOINING: usize = 2;

/// Appends what turns `old` into `new`. False, and nothing appended, where that would not take less than `limit` bytes.
pub(super) fn encode(old: &Page, new: &Page, out: &mut Vec<u8>, limit: usize) -> bool {
    let start = out.len();
    let mut runs = Runs { new, out, covered: 0, from: 0, to: 0 };
    let strides = old.as_chunks::<STRIDE>().0.iter().zip(new.as_chunks::<STRIDE>().0);
    for (index, (was, is)) in strides.enumerate() {
        if was == is {
            continue;
        }
        let words = was.as_chunks::<WORD>().0.iter().zip(is.as_chunks::<WORD>().0);
        for (word, (was, is)) in words.enumerate() {
            let changed = u64::from_le_bytes(*was) ^ u64::from_le_bytes(*is);
            if changed != 0 {
                let at = index * STRIDE + word * WORD;
                let same_before = changed.trailing_zeros() as usize / 8;
                let same_behind = changed.leading_zeros() as usize / 8;
                runs.changed(at + same_before, at + WORD - same_behind);
            }
        }
        // What is open counts too, so that a page that changed all over is given up early.
        if runs.out.len() - start + (runs.to - runs.from) >= limit {
            out.truncate(start);
            return false;
        }
    }
    runs.close();
    let fits = out.len() - start < limit;
    if !fits {
        out.truncate(start);
    }
    fits
}

/// The runs so far; the last is open, because the next change may join it.
struct Runs<'a> {
    new: &'a Page,
    out: &'a mut Vec<u8>,
    /// Bytes of the page that closed runs account for.
    covered: usize,
    from: usize,
    to: usize,
}

impl Runs<'_> {
    fn changed(&mut self, from: usize, to: usize) {
        if self.to == 0 || from - self.to > WORTH_JOINING {
            self.close();
            self.from = from;
        }
        self.to = to;
    }

    fn close(&mut self) {
        if self.to > self.from {
            put(self.out, self.from - self.covered);
            put(self.out, self.to - self.from);
            self.out.extend_from_slice(&self.new[self.from..self.to]);
            self.covered = self.to;
        }
    }
}

/// Appends a number below 2^14.
fn put(out: &mut Vec<u8>, number: usize) {
    let low = number.to_le_bytes()[0] & 0x7F;
    if number < 0x80 {
        out.push(low);
    } else {
        out.push(low | 0x80);
        out.push((number >> 7).to_le_bytes()[0] & 0x7F);
    }
}

/// Takes a number off the front of `body`.
fn take(body: &mut &[u8]) -> Option<usize> {
    let (&low, rest) = body.split_first()?;
    if low & 0x80 == 0 {
        *body = rest;
        return Some(usize::from(low));
    }
    let (&high, rest) = rest.split_first()?;
    *body = rest;
    (high & 0x80 == 0).then_some(usize::from(low & 0x7F) | usize::from(high) << 7)
}

/// Turns the old version in `page` into the new one. An error says why `body` is no delta; `page` is untouched then.
pub(super) fn decode(body: &[u8], page: &mut Page) -> Result<(), &'static str> {
    // Each run takes at least three bytes of the body, so both passes are bounded by its length.
    walk(body, |_, _| ())?;
    walk(body, |at, bytes| page[at..at + bytes.len()].copy_from_slice(bytes))
}

/// Calls `run` for each run: where in the page it begins, and its bytes, which end within the page.
fn walk(mut body: &[u8], mut run: impl FnMut(usize, &[u8])) -> Result<(), &'static str> {
    let mut at = 0;
    while !body.is_empty() {
        let unchanged = take(&mut body).ok_or("a run's first number is cut off or too large")?;
        let changed = take(&mut body).ok_or("a run's second number is cut off or too large")?;
        if changed == 0 {
            return Err("a run changes nothing");
        }
        let bytes = body.split_off(..changed).ok_or("a run is longer than what is left of the body")?;
        at += unchanged;
        if at + changed > size_of::<Page>() {
            return Err("a run goes beyond the page");
        }
        run(at, bytes);
        at += changed;
    }
    Ok(())
}
