//! What binds the lanes of a session to each other, beside the certificates of their ends.
//!
//! A certificate says who may migrate, not which migration a lane belongs to. So the control lane's TLS connection exports a secret,
//! which its two ends know and nobody else, and every other lane's introduction carries a proof of it: a keyed hash over the
//! session, the lane's role and number, and the exporter of the lane's own connection, without which it could be taken from one
//! connection to another. A source that joins a lost link again proves in the same way that it has another secret, exported from
//! the session's first control lane; the lanes that follow prove that of the new control lane.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::Identity;
use super::exporter::Exported;
use crate::types::{LaneId, LaneRole, SessionId};

/// What one connection exports.
#[derive(Clone, Copy)]
pub struct LaneSecrets {
    /// What the other lanes prove, where this is the control lane.
    pub session: Exported,
    /// What a source proves that joins again, where this is the session's first control lane.
    pub rejoin: Exported,
    /// What tells this connection from all others.
    pub lane: Exported,
}

/// What lanes must prove to belong to a session.
#[derive(Clone)]
pub struct SessionSecret {
    lanes: Exported,
    rejoin: Exported,
    /// Whose certificate the other lanes must show.
    peer: Identity,
}

impl fmt::Debug for SessionSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SessionSecret(…)")
    }
}

/// A proof that a lane belongs to a session.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaneProof([u8; 32]);

impl fmt::Debug for LaneProof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LaneProof(…)")
    }
}

impl SessionSecret {
    /// Of a session whose first control lane this is.
    pub(super) const fn of_first(control: &LaneSecrets, peer: Identity) -> Self {
        Self { lanes: control.session, rejoin: control.rejoin, peer }
    }

    /// Of the same session after its link was joined again over another control lane.
    pub(super) const fn joined_again(&self, control: &LaneSecrets, peer: Identity) -> Self {
        Self { lanes: control.session, rejoin: self.rejoin, peer }
    }

    /// The proof for a lane over the connection that exports `own`.
    pub(super) fn prove(&self, session: SessionId, lane: LaneId, own: &LaneSecrets) -> LaneProof {
        LaneProof(*self.hash(session, lane, own).as_bytes())
    }

    /// Whether `proof` is that for the lane. In constant time, and the certificate must be the control lane's, but for a control lane
    /// itself: by the time that a link is joined again, a certificate may have been renewed.
    pub(super) fn verify(
        &self,
        proof: LaneProof,
        session: SessionId,
        lane: LaneId,
        own: &LaneSecrets,
        peer: &Identity,
    ) -> Result<(), String> {
        // blake3's own comparison takes the same time whatever differs.
        if self.hash(session, lane, own) != blake3::Hash::from_bytes(proof.0) {
            return Err(format!("the {lane} does not prove that it belongs to session {}", session.hint()));
        }
        if lane.role != LaneRole::Control && self.peer != *peer {
            return Err(format!("the {lane} shows another certificate than the session's control lane did"));
        }
        Ok(())
    }

    fn hash(&self, SessionId(session): SessionId, lane: LaneId, own: &LaneSecrets) -> blake3::Hash {
        let (key, role) = match lane.role {
            LaneRole::Control => (&self.rejoin, 0),
            LaneRole::Fault => (&self.lanes, 1),
            LaneRole::Bulk => (&self.lanes, 2),
        };
        // Each part has a length of its own, so that no two lanes hash the same bytes.
        let mut hasher = blake3::Hasher::new_keyed(key);
        hasher.update(b"switchover lane\0").update(&session).update(&[role, lane.index]).update(&own.lane);
        hasher.finalize()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secrets(seed: u8) -> LaneSecrets {
        LaneSecrets { session: [seed; 32], rejoin: [seed + 1; 32], lane: [seed + 2; 32] }
    }

    fn identity(seed: u8) -> Identity {
        Identity::of(&[seed])
    }

    #[test]
    fn only_the_lane_that_it_was_made_for_passes_with_a_proof() {
        let session = SessionSecret::of_first(&secrets(10), identity(1));
        let other = SessionSecret::of_first(&secrets(20), identity(1));
        let lane = |role, index| LaneId { role, index };
        let own = secrets(30);
        for id in [lane(LaneRole::Fault, 0), lane(LaneRole::Bulk, 1), lane(LaneRole::Control, 0)] {
            let proof = session.prove(SessionId([7; 16]), id, &own);
            let check = |secret: &SessionSecret, name, id, own: &LaneSecrets, peer| {
                secret.verify(proof, SessionId([name; 16]), id, own, &identity(peer))
            };
            check(&session, 7, id, &own, 1).unwrap();
            for (secret, name, index, own, what) in [
                (&other, 7, id.index, &own, "another session's secret"),
                (&session, 8, id.index, &own, "another session's name"),
                (&session, 7, id.index + 1, &own, "another number"),
                (&session, 7, id.index, &secrets(31), "another connection"),
            ] {
                assert!(check(secret, name, LaneId { index, ..id }, own, 1).unwrap_err().contains("prove"), "{what}");
            }
            for role in [LaneRole::Control, LaneRole::Fault, LaneRole::Bulk].into_iter().filter(|role| *role != id.role)
            {
                assert!(check(&session, 7, LaneId { role, ..id }, &own, 1).is_err(), "another role");
            }
            let renewed = check(&session, 7, id, &own, 2);
            assert_eq!(renewed.is_ok(), id.role == LaneRole::Control, "another certificate");
        }
    }

    #[test]
    fn a_link_that_was_joined_again_keeps_what_it_is_joined_with() {
        let first = SessionSecret::of_first(&secrets(10), identity(1));
        let again = first.joined_again(&secrets(20), identity(2));
        let (name, own) = (SessionId([7; 16]), secrets(30));
        let control = LaneId { role: LaneRole::Control, index: 0 };
        let bulk = LaneId { role: LaneRole::Bulk, index: 0 };
        assert_eq!(first.prove(name, control, &own), again.prove(name, control, &own));
        assert_ne!(first.prove(name, bulk, &own), again.prove(name, bulk, &own));
        let proof = again.prove(name, bulk, &own);
        assert!(again.verify(proof, name, bulk, &own, &identity(2)).is_ok());
        assert!(again.verify(proof, name, bulk, &own, &identity(1)).is_err());
    }
}
