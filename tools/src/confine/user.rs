//! Whom a machine runs as.

use std::str::FromStr;

use nix::unistd::{Gid, Group, Uid, User};
use thiserror::Error;

/// A user and a group, and no further groups.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RunAs {
    /// The user.
    pub user: Uid,
    /// The group.
    pub group: Gid,
}

/// There is no such user.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum UserError {
    /// Nobody of that name.
    #[error("this host has no user `{0}`; give a name that it has (`getent passwd`), or numbers, UID:GID")]
    NoUser(String),
    /// No group of that name.
    #[error("this host has no group `{0}`; give a name that it has (`getent group`), or a number")]
    NoGroup(String),
    /// A number that this host has no account for.
    #[error("this host does not know which group user {0} is of: give it too, {0}:GID")]
    WhichGroup(u32),
    /// It could not be looked up.
    #[error("cannot look up `{name}` among this host's accounts: {source}; give numbers, UID:GID")]
    LookUp {
        /// Who.
        name: String,
        /// The host's answer.
        source: nix::errno::Errno,
    },
}

impl FromStr for RunAs {
    type Err = UserError;

    /// `NAME`, `UID`, `NAME:GROUP`, `UID:GID`.
    fn from_str(text: &str) -> Result<Self, UserError> {
        let (who, of) = text.split_once(':').map_or((text, None), |(who, of)| (who, Some(of)));
        let failed = |name: &str| {
            let name = name.to_owned();
            move |source| UserError::LookUp { name, source }
        };
        let group = match of {
            None => None,
            Some(of) => Some(match of.parse() {
                Ok(number) => Gid::from_raw(number),
                Err(_) => {
                    let found = Group::from_name(of).map_err(failed(of))?;
                    found.ok_or_else(|| UserError::NoGroup(of.to_owned()))?.gid
                }
            }),
        };
        let Ok(number) = who.parse() else {
            let found = User::from_name(who).map_err(failed(who))?.ok_or_else(|| UserError::NoUser(who.to_owned()))?;
            return Ok(Self { user: found.uid, group: group.unwrap_or(found.gid) });
        };
        let user = Uid::from_raw(number);
        let group = match group {
            Some(group) => group,
            None => User::from_uid(user).map_err(failed(who))?.ok_or(UserError::WhichGroup(number))?.gid,
        };
        Ok(Self { user, group })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(text: &str) -> Result<(u32, u32), UserError> {
        text.parse::<RunAs>().map(|who| (who.user.as_raw(), who.group.as_raw()))
    }

    #[test]
    fn names_and_numbers_are_read() {
        assert_eq!(numbers("root"), Ok((0, 0)));
        assert_eq!(numbers("0"), Ok((0, 0)));
        assert_eq!(numbers("root:7"), Ok((0, 7)));
        assert_eq!(numbers("4000000001:4000000002"), Ok((4_000_000_001, 4_000_000_002)));
    }

    #[test]
    fn nobody_is_made_up() {
        assert_eq!(numbers("no-such-user"), Err(UserError::NoUser("no-such-user".to_owned())));
        assert_eq!(numbers("0:no-such-group"), Err(UserError::NoGroup("no-such-group".to_owned())));
        assert_eq!(numbers("4000000001"), Err(UserError::WhichGroup(4_000_000_001)));
    }
}
