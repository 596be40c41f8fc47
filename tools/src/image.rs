//! `switchover image`: what is in an image, whether it is as it was written, and where two differ.

mod diff;
pub(crate) mod inspect;

use std::io::Write as _;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use switchover_image::folder::FolderLock;
use switchover_image::reader::Image;
use switchover_image::{Tally, merge};

use crate::failure::{Failure, say};

/// What `switchover image` takes.
#[derive(Args, Debug)]
pub struct ImageArgs {
    #[command(subcommand)]
    command: ImageCommand,
}

#[derive(Subcommand, Debug)]
enum ImageCommand {
    /// Say what is in an image, without reading its memory
    Inspect {
        /// The image
        file: PathBuf,

        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Read images as a whole, and say whether each is as it was written
    #[command(after_help = VERIFY)]
    Verify {
        /// The images
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
    /// Make one image of an increment and those that it is based on
    #[command(after_help = MERGE)]
    Merge {
        /// The increment
        file: PathBuf,

        /// Write all of the guest into this image, which needs no other one. Without it, the increment is merged with its base, in its
        /// own place
        #[arg(long, value_name = "FILE")]
        to: Option<PathBuf>,
    },
    /// Keep the newest of a series of checkpoints, and merge older ones into them
    #[command(after_help = PRUNE)]
    Prune {
        /// The checkpoints, the oldest first, all that are based on each other
        #[arg(required = true)]
        files: Vec<PathBuf>,

        /// So many are kept
        #[arg(long, value_name = "N")]
        keep: std::num::NonZeroU8,
    },
    /// Say which parts of the state and which pages of memory differ between two images
    #[command(after_help = DIFF)]
    Diff {
        /// One image
        one: PathBuf,

        /// The other
        other: PathBuf,
    },
}

const VERIFY: &str = "\
Everything in an image has a hash (BLAKE3), and those a root hash, which is printed. No secret goes into it: this finds damage, \
not an image that somebody has made anew. Keep the root hash elsewhere to find that out too.

Exit status: 0 when all are as they were written, 1 when one is not or cannot be read.";

const MERGE: &str = "\
Merged in its own place, the increment is based on what its base was based on, or on nothing; the base is needed for it no more, and \
left where it is. Images that are based on the increment find it as before. What was there is replaced when the new one is whole.

Exit status: 0 when it is merged, 1 when one of them is damaged or the image cannot be written.";

const PRUNE: &str = "\
Each of the oldest is merged into those that are based on it, and removed then. Whoever is killed in between leaves a series in which \
every checkpoint can be restored.

Exit status: 0 when so many are left, 1 when one is damaged, or an image cannot be written or removed.";

const DIFF: &str = "\
Pages are numbered as in the guest's memory, in hexadecimal, 4 KiB each. Both images are verified on the way.

Exit status: 0 when the two hold the same guest, 1 when they differ, or one is damaged or cannot be read.";

/// Does what `switchover image` is told.
///
/// # Errors
/// When an image cannot be read, is damaged, or differs from another.
pub fn main(args: &ImageArgs) -> Result<(), Failure> {
    match &args.command {
        ImageCommand::Inspect { file, json } => {
            let image = open(file)?;
            print(&if *json { inspect::json(&image) } else { inspect::text(&image) });
            Ok(())
        }
        ImageCommand::Verify { files } => verify(files),
        ImageCommand::Merge { file, to } => {
            let lock = FolderLock::exclusive(file).map_err(Failure::failed)?;
            let image = open(file)?;
            let merged = match to {
                Some(to) => merge::flatten(&image, to, &Tally::default()),
                None => merge::merge_with_base(&lock, &image, &Tally::default()),
            };
            merged.map(drop).map_err(Failure::failed)
        }
        ImageCommand::Prune { files, keep } => {
            let keep = usize::from(keep.get());
            // The command line wants one at least.
            let Some(first) = files.first() else { return Ok(()) };
            let lock = FolderLock::exclusive(first).map_err(Failure::failed)?;
            merge::prune(&lock, &mut files.clone(), keep, &Tally::default()).map_err(Failure::failed)
        }
        ImageCommand::Diff { one, other } => {
            let found = diff::diff(&open(one)?, &open(other)?).map_err(Failure::failed)?;
            print(&found.text);
            if found.same { Ok(()) } else { Err(Failure::failed("the two images differ")) }
        }
    }
}

fn verify(files: &[PathBuf]) -> Result<(), Failure> {
    let mut damaged = 0;
    for file in files {
        let checked = Image::open(file).and_then(|image| image.verify(&Tally::default()).map(|()| image));
        match checked {
            Ok(image) => print(&format!(
                "{}: as it was written; chunks of memory: {}; root {}\n",
                file.display(),
                image.header().chunks(),
                inspect::root(&image)
            )),
            Err(error) => {
                damaged += 1;
                say(error);
            }
        }
    }
    match damaged {
        0 => Ok(()),
        count => Err(Failure::failed(format_args!("{count} of {} cannot be restored from", files.len()))),
    }
}

fn open(file: &Path) -> Result<Image, Failure> {
    Image::open(file).map_err(Failure::failed)
}

fn print(text: &str) {
    // Whoever closes the output has seen enough.
    let _ = std::io::stdout().lock().write_all(text.as_bytes());
}
