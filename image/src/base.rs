//! What an image is an increment on.
//!
//! A guest's *moment* is its state: the hash of an image's sections but the base. So an image that is made of others, of the same
//! moment, can take the place of one of them, and those above it find it as before.

use std::path::{Path, PathBuf};

use crate::error::ImageError;
use crate::reader::Image;

/// The hash that a moment of a guest is known by.
pub type Moment = [u8; blake3::OUT_LEN];

/// The most images that one is made of.
pub const MOST_LAYERS: usize = 64;

/// The longest name of a base.
pub(crate) const LONGEST_NAME: usize = 255;

/// The image that another one says only the differences to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Base {
    /// Which moment of the guest it holds.
    pub moment: Moment,
    /// The name of its file, in the folder of the image that is based on it.
    pub name: String,
}

impl Base {
    /// The image at `path`, which holds `moment`, as the base of one in the same folder.
    ///
    /// # Errors
    /// When its name is no text, or too long.
    pub fn at(path: &Path, moment: Moment) -> Result<Self, ImageError> {
        let name = path.file_name().and_then(|name| name.to_str()).filter(|name| is_name(name));
        let why = "an image cannot be based on one whose name is no text of at most 255 bytes";
        let name = name.ok_or_else(|| ImageError::Place { path: path.to_owned(), why })?;
        Ok(Self { moment, name: name.to_owned() })
    }

    /// `image` as the base of one that is to be written to `to`, in the same folder.
    ///
    /// # Errors
    /// When `to` is its file or one that it is based on, when it is made of too many already, and as [`at`](Self::at).
    pub fn of(image: &Image, to: &Path) -> Result<Self, ImageError> {
        if image.stands_on(to) {
            let why = "it would take the place of an image that it is based on";
            return Err(ImageError::Place { path: to.to_owned(), why });
        }
        if image.layers().count() >= MOST_LAYERS {
            return Err(ImageError::TooManyLayers { path: to.to_owned(), most: MOST_LAYERS });
        }
        Self::at(image.path(), image.sections().moment()?)
    }

    /// Where it is, of the image `path`.
    #[must_use]
    pub fn beside(&self, path: &Path) -> PathBuf {
        path.with_file_name(&self.name)
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        [&self.moment[..], self.name.as_bytes()].concat()
    }

    /// `None` where the payload makes no sense.
    pub(crate) fn decode(payload: &[u8]) -> Option<Self> {
        let (moment, name) = payload.split_first_chunk()?;
        let name = std::str::from_utf8(name).ok().filter(|name| is_name(name))?;
        Some(Self { moment: *moment, name: name.to_owned() })
    }
}

/// Whether it is a name within a folder, and leads nowhere else.
fn is_name(name: &str) -> bool {
    let harmless = !name.contains(['/', '\0']) && !name.contains(char::is_control);
    harmless && !matches!(name, "" | "." | "..") && name.len() <= LONGEST_NAME
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_base_is_a_name_in_the_same_folder() {
        let base = Base::at(Path::new("/a/b.image"), [7; 32]).unwrap();
        assert_eq!(Base::decode(&base.encode()), Some(base.clone()));
        assert_eq!(base.beside(Path::new("/c/d.image")), Path::new("/c/b.image"));
        let moment = [0; 32];
        for name in ["", ".", "..", "a/b", "../b", "a\0", "a\n", &"a".repeat(256)] {
            let payload = [&moment[..], name.as_bytes()].concat();
            assert_eq!(Base::decode(&payload), None, "{name:?}");
        }
        assert_eq!(Base::decode(&moment[1..]), None);
        assert!(Base::at(Path::new("/a/.."), moment).is_err());
    }
}
