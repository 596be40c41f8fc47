//! TLS 1.3 records (RFC 8446, section 5), once a handshake has made their keys.
//!
//! rustls makes the handshake and every key; what is encrypted and decrypted here is application data, a whole record at a time,
//! each where it lies: what is sent is copied once, from guest memory into the record, and what is received is copied once, from
//! the record to its place. Through rustls's own connections it would be copied twice and allocated for in each direction, which a
//! fault waits for. The two directions share nothing but what derives their next keys.
//!
//! Pure: no socket and no clock in here.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use rustls::ConnectionTrafficSecrets;

use super::TlsError;
use super::keys::Keys;

/// The most plaintext that a record carries.
pub const MAX_PLAINTEXT: usize = 1 << 14;

/// Type, version and length, which no record lacks.
const HEADER: usize = 5;
/// All AEADs that are negotiated have tags of this length.
const TAG: usize = 16;
/// What a record is longer than its plaintext: the content's type is encrypted with it.
pub const OVERHEAD: usize = HEADER + 1 + TAG;
/// The longest record that is accepted: others may pad theirs, up to this (RFC 8446, section 5.2).
const MAX_RECORD: usize = HEADER + MAX_PLAINTEXT + 256;

/// As many full records are received at once, so that a frame does not cost an operation for each.
const RECORDS_AT_ONCE: usize = 4;
const AT_ONCE: usize = RECORDS_AT_ONCE * (MAX_PLAINTEXT + OVERHEAD);
/// Room for them behind what may be there of another.
const BUFFER: usize = AT_ONCE + MAX_RECORD;

/// The version that records of every TLS 1.3 say on the outside.
const VERSION: [u8; 2] = [3, 3];

const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const APPLICATION_DATA: u8 = 23;

const KEY_UPDATE: u8 = 24;
/// Type, and a length of three bytes.
const KEY_UPDATE_NOTICE: [u8; 5] = [KEY_UPDATE, 0, 0, 1, 0];
const UPDATE_REQUESTED: u8 = 1;

/// Key updates and empty records that may come one after the other: more are a waste of this side's time.
const FRUITLESS_LIMIT: u32 = 32;

/// Records after which a key is updated, whatever its cipher allows: a bound on the sequence number.
const RECORDS_LIMIT: u64 = 1 << 40;

/// One direction's key.
struct Cipher {
    key: LessSafeKey,
    iv: [u8; NONCE_LEN],
    sequence: u64,
}

impl Cipher {
    fn new((sequence, secrets): (u64, ConnectionTrafficSecrets)) -> Result<Self, TlsError> {
        let (algorithm, key, iv) = match &secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (&CHACHA20_POLY1305, key, iv),
            _ => return Err(TlsError::Internal("a cipher without a record layer was negotiated")),
        };
        let key =
            UnboundKey::new(algorithm, key.as_ref()).map_err(|_| TlsError::Internal("a key has a wrong length"))?;
        let iv = iv.as_ref().try_into().map_err(|_| TlsError::Internal("a nonce has a wrong length"))?;
        Ok(Self { key: LessSafeKey::new(key), iv, sequence })
    }

    /// The next record's, which is used once: the sequence number goes on with it.
    fn next_nonce(&mut self) -> Nonce {
        let mut nonce = self.iv;
        for (byte, number) in nonce[NONCE_LEN - 8..].iter_mut().zip(self.sequence.to_be_bytes()) {
            *byte ^= number;
        }
        self.sequence += 1;
        Nonce::assume_unique_for_key(nonce)
    }
}

/// The sending direction of a lane.
pub struct Sealer {
    cipher: Cipher,
    /// Records before the next key.
    limit: u64,
    keys: Arc<Keys>,
    updates: u64,
    /// The other side wants a new key: said by the receiving direction.
    update_wanted: Arc<AtomicBool>,
}

/// Sealed records on their way to the socket, in one piece of memory that is never allocated again.
pub struct Sealed {
    bytes: Box<[u8]>,
    used: usize,
}

impl Sealed {
    /// What a record may take besides its plaintext: a key may be updated before each.
    const EACH: usize = OVERHEAD + KEY_UPDATE_NOTICE.len() + OVERHEAD;

    /// Room for records with `plaintext` bytes in all, and a key update before each.
    pub fn with_room_for(plaintext: usize) -> Self {
        let records = plaintext.div_ceil(MAX_PLAINTEXT).max(1) + 1;
        let room = plaintext + records * Self::EACH;
        Self { bytes: vec![0; room].into_boxed_slice(), used: 0 }
    }

    /// Forgets what has been sealed, for records with `plaintext` bytes in all: in the same memory, where that suffices.
    pub fn make_room_for(&mut self, plaintext: usize) {
        self.clear();
        let records = plaintext.div_ceil(MAX_PLAINTEXT);
        if self.bytes.len() < plaintext + records * Self::EACH {
            *self = Self::with_room_for(plaintext);
        }
    }

    /// What has been sealed.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.used]
    }

    /// Forgets it.
    pub fn clear(&mut self) {
        self.used = 0;
    }

    /// Whether a record of so many bytes still fits.
    pub fn has_room_for(&self, plaintext: usize) -> bool {
        self.bytes.len() - self.used >= plaintext + Self::EACH
    }
}

impl Sealer {
    pub(super) fn new(
        secrets: (u64, ConnectionTrafficSecrets),
        keys: &Arc<Keys>,
        update_wanted: &Arc<AtomicBool>,
    ) -> Result<Self, TlsError> {
        let limit = keys.limit().clamp(1, RECORDS_LIMIT);
        Ok(Self {
            cipher: Cipher::new(secrets)?,
            limit,
            keys: Arc::clone(keys),
            updates: 0,
            update_wanted: Arc::clone(update_wanted),
        })
    }

    /// Appends a record of `length` bytes, at most [`MAX_PLAINTEXT`], which `fill` writes; and before it the notice of a new
    /// key where the old one has done its part.
    ///
    /// # Errors
    /// When there is no room, or no key.
    pub fn seal(&mut self, to: &mut Sealed, length: usize, fill: impl FnOnce(&mut [u8])) -> Result<(), TlsError> {
        if length > MAX_PLAINTEXT || !to.has_room_for(length) {
            return Err(TlsError::Internal("a record has no room"));
        }
        if self.cipher.sequence >= self.limit - 1 || self.update_wanted.swap(false, Ordering::AcqRel) {
            self.record(to, HANDSHAKE, KEY_UPDATE_NOTICE.len(), |bytes| bytes.copy_from_slice(&KEY_UPDATE_NOTICE))?;
            self.change_key()?;
        }
        self.record(to, APPLICATION_DATA, length, fill)
    }

    fn change_key(&mut self) -> Result<(), TlsError> {
        self.cipher = Cipher::new(self.keys.next_to_send()?)?;
        self.updates += 1;
        Ok(())
    }

    /// How many keys came after the handshake's.
    #[must_use]
    pub const fn updates(&self) -> u64 {
        self.updates
    }

    /// Announces a new key and asks the other side for one.
    #[cfg(test)]
    pub fn request_update(&mut self) -> Result<Vec<u8>, TlsError> {
        let mut sealed = Sealed::with_room_for(0);
        let [kind, high, middle, low, _] = KEY_UPDATE_NOTICE;
        let notice = [kind, high, middle, low, UPDATE_REQUESTED];
        self.record(&mut sealed, HANDSHAKE, notice.len(), |bytes| bytes.copy_from_slice(&notice))?;
        self.change_key()?;
        Ok(sealed.bytes().to_vec())
    }

    /// Ends the connection, properly where the description is 0.
    #[cfg(test)]
    pub fn alert(&mut self, description: u8) -> Result<Vec<u8>, TlsError> {
        let mut sealed = Sealed::with_room_for(0);
        self.record(&mut sealed, ALERT, 2, |bytes| bytes.copy_from_slice(&[1, description]))?;
        Ok(sealed.bytes().to_vec())
    }

    fn record(
        &mut self,
        to: &mut Sealed,
        kind: u8,
        length: usize,
        fill: impl FnOnce(&mut [u8]),
    ) -> Result<(), TlsError> {
        let (header, rest) = to.bytes[to.used..].split_at_mut(HEADER);
        let (inner, tag) = rest[..length + 1 + TAG].split_at_mut(length + 1);
        let [high, low] = u16::try_from(length + 1 + TAG).unwrap_or(u16::MAX).to_be_bytes();
        header.copy_from_slice(&[APPLICATION_DATA, VERSION[0], VERSION[1], high, low]);
        fill(&mut inner[..length]);
        inner[length] = kind;
        let nonce = self.cipher.next_nonce();
        let sealed = self.cipher.key.seal_in_place_separate_tag(nonce, Aad::from(&*header), inner);
        tag.copy_from_slice(sealed.map_err(|_| TlsError::Internal("a record could not be sealed"))?.as_ref());
        to.used += HEADER + length + 1 + TAG;
        Ok(())
    }
}

/// The receiving direction of a lane: ciphertext in, plaintext out, in a buffer of its own.
pub struct Opener {
    cipher: Cipher,
    keys: Arc<Keys>,
    update_wanted: Arc<AtomicBool>,
    updates: u64,
    fruitless: u32,
    buffer: Box<[u8]>,
    /// Received and not opened yet.
    sealed: Range<usize>,
    /// Opened and not taken yet; before `sealed`.
    plain: Range<usize>,
    /// Nothing that comes after what was wrong is looked at.
    broken: bool,
}

impl Opener {
    pub(super) fn new(
        secrets: (u64, ConnectionTrafficSecrets),
        keys: &Arc<Keys>,
        update_wanted: &Arc<AtomicBool>,
        opened: &[u8],
        received: &[u8],
    ) -> Result<Self, TlsError> {
        let mut buffer = vec![0; BUFFER].into_boxed_slice();
        let (plain, end) = (opened.len(), opened.len() + received.len());
        if end > BUFFER {
            return Err(TlsError::Internal("more was received than a handshake may leave"));
        }
        buffer[..plain].copy_from_slice(opened);
        buffer[plain..end].copy_from_slice(received);
        Ok(Self {
            cipher: Cipher::new(secrets)?,
            keys: Arc::clone(keys),
            update_wanted: Arc::clone(update_wanted),
            updates: 0,
            fruitless: 0,
            buffer,
            sealed: plain..end,
            plain: 0..plain,
            broken: false,
        })
    }

    /// Plaintext that is here, after opening the next record where there is none. Empty when more must be received first.
    ///
    /// # Errors
    /// When what was received is no record of this lane, in its order; or the other side ended it.
    pub fn plaintext(&mut self) -> Result<&[u8], TlsError> {
        if self.broken {
            return Err(TlsError::Broken);
        }
        while self.plain.is_empty() {
            match self.open_next() {
                Ok(true) => {}
                Ok(false) => return Ok(&[]),
                Err(error) => {
                    self.broken = true;
                    return Err(error);
                }
            }
        }
        Ok(&self.buffer[self.plain.clone()])
    }

    /// The first `count` bytes of the plaintext have been taken.
    pub fn take(&mut self, count: usize) {
        self.plain.start = (self.plain.start + count).min(self.plain.end);
    }

    /// Where in the buffer the plaintext begins that was not taken yet, and what was taken ends.
    #[must_use]
    pub const fn position(&self) -> usize {
        self.plain.start
    }

    /// What was opened from a [`position`](Self::position) on, until there is [space](Self::space) for more.
    #[must_use]
    pub fn opened_at(&self, position: usize) -> &[u8] {
        self.buffer.get(position..self.plain.end).unwrap_or_default()
    }

    /// How many keys came after the handshake's.
    #[must_use]
    pub const fn updates(&self) -> u64 {
        self.updates
    }

    /// Whether a part of a record is here.
    #[must_use]
    pub fn is_within_a_record(&self) -> bool {
        !self.sealed.is_empty()
    }

    /// Where the next bytes from the socket belong: room for the rest of a record at least. How many are needed before
    /// `wanted` bytes of plaintext can be here is the second figure, which is never more than will come.
    pub fn space(&mut self, wanted: usize) -> (&mut [u8], usize) {
        if self.plain.is_empty() && (self.sealed.is_empty() || self.buffer.len() - self.sealed.end < AT_ONCE) {
            self.buffer.copy_within(self.sealed.clone(), 0);
            self.sealed = 0..self.sealed.len();
            self.plain = 0..0;
        }
        let whole = (wanted + wanted.div_ceil(MAX_PLAINTEXT).max(1) * OVERHEAD).min(AT_ONCE);
        // Where a header is here, its record must be whole before anything of it can be had.
        let record = self.next_length().map_or(0, |length| length.unwrap_or(0));
        let needed = whole.max(record).saturating_sub(self.sealed.len()).max(1);
        let space = &mut self.buffer[self.sealed.end..];
        let needed = needed.min(space.len());
        (space, needed)
    }

    /// So many bytes have been received into the [`space`](Self::space).
    pub fn received(&mut self, count: usize) {
        self.sealed.end = (self.sealed.end + count).min(self.buffer.len());
    }

    /// Bytes of the next record, its header included, once that is here.
    fn next_length(&self) -> Result<Option<usize>, TlsError> {
        let Some(&[kind, major, minor, high, low]) = self.buffer[self.sealed.clone()].first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let length = HEADER + usize::from(u16::from_be_bytes([high, low]));
        if kind != APPLICATION_DATA || [major, minor] != VERSION {
            return Err(TlsError::Record("it does not begin as one"));
        }
        if length > MAX_RECORD {
            return Err(TlsError::Record("it is longer than any may be"));
        }
        if length < OVERHEAD {
            return Err(TlsError::Record("it is shorter than any can be"));
        }
        Ok(Some(length))
    }

    /// Opens the next record; `false` when it is not whole yet.
    fn open_next(&mut self) -> Result<bool, TlsError> {
        let Some(length) = self.next_length()?.filter(|length| *length <= self.sealed.len()) else { return Ok(false) };
        let start = self.sealed.start;
        let (header, body) = self.buffer[start..start + length].split_at_mut(HEADER);
        let nonce = self.cipher.next_nonce();
        let opened = self.cipher.key.open_in_place(nonce, Aad::from(&*header), body);
        let opened =
            opened.map_err(|_| TlsError::Record("it was changed on the way, or is not the one that is due"))?;
        // The type of what is inside comes last, before zeros that only make it longer.
        let inner = opened.iter().rposition(|byte| *byte != 0);
        let inner = inner.ok_or(TlsError::Record("nothing is in it"))?;
        if inner > MAX_PLAINTEXT {
            return Err(TlsError::Record("more is in it than may be"));
        }
        let kind = opened[inner];
        self.sealed.start += length;
        self.plain = start + HEADER..start + HEADER + inner;
        match kind {
            APPLICATION_DATA if inner > 0 => {
                self.fruitless = 0;
                return Ok(true);
            }
            APPLICATION_DATA => {}
            HANDSHAKE => self.update_key()?,
            ALERT => return Err(self.alert()),
            _ => return Err(TlsError::Record("its content is of an unknown type")),
        }
        self.plain = 0..0;
        self.fruitless += 1;
        if self.fruitless > FRUITLESS_LIMIT {
            return Err(TlsError::Record("too many come that carry nothing"));
        }
        Ok(true)
    }

    /// The one handshake message that either side sends after the handshake. (A destination here issues no tickets.)
    fn update_key(&mut self) -> Result<(), TlsError> {
        let [KEY_UPDATE, 0, 0, 1, wish @ (0 | UPDATE_REQUESTED)] = self.buffer[self.plain.clone()] else {
            return Err(TlsError::Record("it carries a handshake message that is no key update"));
        };
        // Said before it is sent: the sending direction updates its key before its next record.
        if wish == UPDATE_REQUESTED {
            self.update_wanted.store(true, Ordering::Release);
        }
        self.cipher = Cipher::new(self.keys.next_to_receive()?)?;
        self.updates += 1;
        Ok(())
    }

    fn alert(&self) -> TlsError {
        match self.buffer[self.plain.clone()] {
            [_, 0] => TlsError::Closed,
            [_, description] => TlsError::Alert(description.into()),
            _ => TlsError::Record("it carries an alert that is none"),
        }
    }
}
