//! One image of several: a chain of increments written anew, in fewer files, and the oldest of a series taken out of it.
//!
//! What is written takes the place of an image by a rename, like every image, and is of the same moment: those that are based on it find
//! it as before. Nothing is removed before that. So whoever is killed in between leaves a chain of which every image can be restored.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use switchover_wire::types::{PAGE_SIZE, PageIndex};

use crate::base::{Base, MOST_LAYERS};
use crate::crew::Tally;
use crate::error::ImageError;
use crate::folder::{FolderLock, is_one_file};
use crate::layout::CHUNK_PAGES;
use crate::partial::{folder_of, sync};
use crate::reader::{ChunkReader, Image};
use crate::writer::{ImageWriter, Options, Written};

/// Writes all of the guest of `top` into the image `to`, which needs no other one then. It may be the file of `top` itself.
///
/// # Errors
/// When something of it is damaged or cannot be read, or the image not be written; or when `to` is an image that it is based on, as
/// others may be. What was there before stays then.
pub fn flatten(top: &Image, to: &Path, tally: &Tally) -> Result<Written, ImageError> {
    if top.layers().skip(1).any(|layer| is_one_file(layer.path(), to)) {
        let why = "it would take the place of an image that it, and others perhaps, are based on";
        return Err(ImageError::Place { path: to.to_owned(), why });
    }
    let mut which = vec![0_u64; words(top)];
    for page in (0..top.pages().0).filter(|page| top.holds(PageIndex(*page))) {
        which[place(page / 64)] |= 1 << (page % 64);
    }
    let writer = ImageWriter::create(to, top.pages(), Options::default())?;
    write(top, MOST_LAYERS, writer, &which, tally)
}

/// Writes the differences of `top` to the image that its base is based on, in the place of `top`: nothing needs the base any more. Where
/// the base is complete, so is `top` then. `top` was opened after its folder was locked.
///
/// # Errors
/// As [`flatten`].
pub fn merge_with_base(_lock: &FolderLock, top: &Image, tally: &Tally) -> Result<Written, ImageError> {
    let mut layers = top.layers().skip(1);
    let (Some(base), Some(below)) = (layers.next(), layers.next()) else {
        return flatten(top, top.path(), tally);
    };
    let mut which = top.own_words();
    which.iter_mut().zip(base.own_words()).for_each(|(own, of_base)| *own |= of_base);
    let below = Base::at(below.path(), below.sections().moment()?)?;
    let writer = ImageWriter::create_on(below, top.path(), top.pages())?;
    write(top, 2, writer, &which, tally)
}

/// Takes the oldest images of a series out, until `keep` are left, one at least: each is merged into those that are based on it before
/// it goes. `series` is in order, and becomes what is left. Only the first may have been made by somebody else. All of them lie in the
/// folder of `lock`.
///
/// # Errors
/// As [`merge_with_base`], when an image cannot be removed, and when the series is not in order. What `series` is then can be restored,
/// all of it.
pub fn prune(lock: &FolderLock, series: &mut Vec<PathBuf>, keep: usize, tally: &Tally) -> Result<(), ImageError> {
    while series.len() > keep.max(1) {
        take_out(lock, series, 0, tally)?;
    }
    Ok(())
}

/// The same for a series that grows, at less cost: the complete image that the others are based on may stay below the `keep` newest.
/// Those above it are merged with each other, which writes what they hold and no more, until that has come to half of it; then it is
/// merged, too, and goes.
///
/// # Errors
/// As [`prune`].
pub fn thin_out(lock: &FolderLock, series: &mut Vec<PathBuf>, keep: usize, tally: &Tally) -> Result<(), ImageError> {
    let keep = keep.max(1);
    while series.len() > keep {
        let (oldest, second) = (&series[0], Image::open(&series[1])?);
        let small = is_based_on(&second, oldest) && {
            let full = Image::open(oldest).map_or(0, |image| image.stored_bytes());
            second.stored_bytes() < full / 2
        };
        match (small, series.len() > keep + 1) {
            (true, true) => take_out(lock, series, 1, tally)?,
            (true, false) => break,
            (false, _) => take_out(lock, series, 0, tally)?,
        }
    }
    Ok(())
}

/// Takes an image out of a series: merges it into those that are based on it, and removes it.
fn take_out(lock: &FolderLock, series: &mut Vec<PathBuf>, at: usize, tally: &Tally) -> Result<(), ImageError> {
    let (gone, later) = (&series[at], &series[at + 1..]);
    if let Some(path) = series.iter().find(|path| !is_one_file(folder_of(path), lock.folder())) {
        let why = "all of it lies in one folder, which is locked meanwhile";
        return Err(ImageError::Series { path: path.clone(), why });
    }
    let based_on_later = |image: Image| image.layers().skip(1).any(|layer| has(later, layer.path()));
    if has(later, gone) || Image::open(gone).is_ok_and(based_on_later) {
        let why = "it is there twice, or based on a later one of the series: name the oldest first";
        return Err(ImageError::Series { path: gone.clone(), why });
    }
    // Several, where one of them was merged before.
    for path in later {
        let image = Image::open(path)?;
        if is_based_on(&image, gone) {
            merge_with_base(lock, &image, tally)?;
        }
    }
    fs::remove_file(gone).map_err(ImageError::io("remove", gone))?;
    let folder = folder_of(gone);
    sync(folder).map_err(ImageError::io("make durable what was removed from", folder))?;
    series.remove(at);
    Ok(())
}

/// Whether `image` holds the differences to the file `base`.
fn is_based_on(image: &Image, base: &Path) -> bool {
    image.base().is_some_and(|known| is_one_file(&known.beside(image.path()), base))
}

fn has(series: &[PathBuf], path: &Path) -> bool {
    series.iter().any(|other| is_one_file(other, path))
}

/// Writes those pages of `top` that have a bit in `which`, all of which its topmost `layers` say what they are.
fn write(top: &Image, layers: usize, writer: ImageWriter, which: &[u64], tally: &Tally) -> Result<Written, ImageError> {
    // A thread takes one, or makes one, and puts it back: that which has read the chunk already, as its pages are asked for stretch by
    // stretch.
    let readers: Mutex<Vec<(u64, ChunkReader<'_>)>> = Mutex::default();
    let held = || readers.lock().unwrap_or_else(PoisonError::into_inner);
    let read_by = |number: u64| -> Result<ChunkReader<'_>, ImageError> {
        let mut idle = held();
        if let Some(at) = idle.iter().position(|(has, _)| *has == number) {
            return Ok(idle.swap_remove(at).1);
        }
        let other = idle.pop();
        drop(idle);
        let mut reader = other.map_or_else(|| top.reader_of(layers), |(_, reader)| Ok(reader))?;
        reader.read(number)?;
        Ok(reader)
    };
    let read = |first: PageIndex, bytes: &mut [u8]| {
        let number = first.0 / CHUNK_PAGES as u64;
        let reader = read_by(number).map_err(io::Error::other)?;
        let chunk = reader.again(number);
        for (page, bytes) in (first.0..).map(PageIndex).zip(bytes.chunks_exact_mut(PAGE_SIZE)) {
            match chunk.page(page) {
                Some(page) => bytes.copy_from_slice(page),
                None => bytes.fill(0),
            }
        }
        held().push((number, reader));
        Ok(())
    };
    let nothing = |_: PageIndex, _: &[u64]| Ok(());
    writer.rewrite(&read, which, &nothing, tally)?;
    writer.settle(tally)?;
    writer.commit(top.sections())
}

fn words(image: &Image) -> usize {
    place(image.header().chunks()) * (CHUNK_PAGES / 64)
}

fn place(index: u64) -> usize {
    usize::try_from(index).unwrap_or(usize::MAX)
}
