//! Bodies to pages.

use std::fmt;

use lz4_flex::block::decompress_into;
use zstd::zstd_safe::{DCtx, get_error_name};

use super::{Encoding, EncodingError, Entry, Page, delta, zstd_frame};
use crate::types::{PAGE_SIZE, PageIndex};

/// Decodes pages, one after another, in memory that it allocates once.
#[derive(Default)]
pub struct PageDecoder {
    /// Made when it is first needed.
    zstd: Option<DCtx<'static>>,
}

impl PageDecoder {
    /// A decoder.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Decodes `entry` into `page`, which must hold the page's old version where the encoding is
    /// [`Encoding::Delta`]. Where it is [`Encoding::Same`], `held` is called once with the other page's number: it
    /// fills in that page as it is here, or says that it is not here. What it fills in is believed only if its hash is
    /// that of the entry.
    ///
    /// # Errors
    /// Where the body is not what the entry says, or the other page is not what it should be. What `page` then
    /// holds is no version of anything.
    pub fn decode(
        &mut self,
        entry: &Entry<'_>,
        page: &mut Page,
        held: &mut dyn FnMut(PageIndex, &mut Page) -> bool,
    ) -> Result<(), EncodingError> {
        let body = entry.body();
        match entry.encoding() {
            Encoding::Raw => match body.first_chunk() {
                Some(content) if body.len() == PAGE_SIZE => {
                    *page = *content;
                    Ok(())
                }
                _ => Err("it is not one page long".to_owned()),
            },
            Encoding::Lz4 => lz4(body, page),
            Encoding::Zstd => self.zstd(body, page),
            Encoding::Delta => delta::decode(body, page).map_err(str::to_owned),
            Encoding::Same => same(entry, page, held),
        }
        .map_err(|reason| EncodingError::Body { page: entry.page(), encoding: entry.encoding(), reason })
    }

    fn zstd(&mut self, body: &[u8], page: &mut Page) -> Result<(), String> {
        zstd_frame::check(body).map_err(str::to_owned)?;
        if self.zstd.is_none() {
            self.zstd = DCtx::try_create();
        }
        let Some(context) = &mut self.zstd else { return Err("there is no memory for zstd's work".to_owned()) };
        let length = context.decompress(&mut page[..], body).map_err(|code| get_error_name(code).to_owned())?;
        whole(length)
    }
}

impl fmt::Debug for PageDecoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PageDecoder")
    }
}

fn lz4(body: &[u8], page: &mut Page) -> Result<(), String> {
    whole(decompress_into(body, page).map_err(|error| error.to_string())?)
}

fn same(entry: &Entry<'_>, page: &mut Page, held: &mut dyn FnMut(PageIndex, &mut Page) -> bool) -> Result<(), String> {
    let Some((other, hash)) = entry.same_as() else { return Err("it names no page".to_owned()) };
    if !held(other, page) {
        return Err(format!("{other} is not here"));
    }
    if blake3::hash(page) == hash { Ok(()) } else { Err(format!("{other} has another content here")) }
}

fn whole(length: usize) -> Result<(), String> {
    if length == PAGE_SIZE { Ok(()) } else { Err(format!("it holds {length} bytes, not {PAGE_SIZE}")) }
}
