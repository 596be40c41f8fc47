use switchover_wire::handshake::MAX_REASON;
use switchover_wire::message::ControlMessage;

/// Bodies of messages on the control lane.
pub fn control(bytes: &[u8]) {
    let Ok(message) = ControlMessage::decode(bytes) else { return };
    assert!(!message.name().is_empty());
    if let ControlMessage::Refused { reason } | ControlMessage::Abort { reason } = &message {
        assert!(
            reason.len() <= MAX_REASON && !reason.contains(char::is_control),
            "a reason that is not fit to be shown"
        );
    }
    let written = postcard::to_stdvec(&message).unwrap();
    assert_eq!(ControlMessage::decode(&written).unwrap(), message);
}
