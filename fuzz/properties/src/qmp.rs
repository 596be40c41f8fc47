use serde_json::{Value, json};
use switchover_runtime::qmp::arguments::Arguments;
use switchover_runtime::qmp::capabilities::Capabilities;
use switchover_runtime::qmp::channel::{Target, take_target};
use switchover_runtime::qmp::framing::{Framing, InputError};
use switchover_runtime::qmp::parameters::Parameters;
use switchover_runtime::qmp::settings::settings;

use crate::input::Input;

/// Longest value, so short that a fuzzer finds it.
const LIMIT: usize = 512;
/// Longer than any that is written here.
const NO_LIMIT: usize = 1 << 24;

/// The stream of a QMP socket. The first byte says in how large pieces it comes.
pub fn framing(bytes: &[u8]) {
    let mut input = Input(bytes);
    let cut = usize::from(input.u8()).max(1);
    let whole = Framing::new(LIMIT).feed(input.0);
    assert!(whole.len() <= input.0.len(), "more values than bytes");
    let mut cutting = Framing::new(LIMIT);
    let pieces: Vec<_> = input.0.chunks(cut).flat_map(|piece| cutting.feed(piece)).collect();
    assert_eq!(pieces, whole, "cut every {cut} bytes");
    for found in whole {
        match found {
            Ok(value) => {
                // A number at the top ends with the byte behind it.
                let text = format!("{value}\n");
                assert_eq!(Framing::new(NO_LIMIT).feed(text.as_bytes()), [Ok(value)]);
            }
            Err(InputError::Syntax { reason }) => assert!(!reason.is_empty()),
            Err(InputError::TooLong { limit }) => assert_eq!(limit, LIMIT),
        }
    }
    // Two quotes, each at the end of a line: whatever was open is given up by then.
    let found = cutting.feed(b"\"\n\"\n{\"sound\": 1}").pop();
    assert_eq!(found, Some(Ok(json!({"sound": 1}))), "the stream does not recover");
}

/// The arguments of commands.
pub fn arguments(bytes: &[u8]) {
    let Ok(Value::Object(members)) = serde_json::from_slice(bytes) else { return };
    let arguments = || Arguments::new(members.clone());
    if let Ok(Target::Machine(address)) = take_target(&mut arguments()) {
        assert_eq!(address.to_string().parse(), Ok(address));
    }
    let capabilities = Capabilities::default().set(arguments());
    if let Ok(capabilities) = &capabilities {
        assert_eq!(capabilities.set(arguments()).unwrap().to_value(), capabilities.to_value());
    }
    let parameters = Parameters::default().set(arguments());
    if let Ok(parameters) = &parameters {
        assert_eq!(parameters.set(arguments()).as_ref(), Ok(parameters));
    }
    let _ = settings(&capabilities.unwrap_or_default(), &parameters.unwrap_or_default());
    for name in members.keys() {
        let mut all = arguments();
        let _ = (all.optional::<u64>(name), all.required::<String>(name), all.finish());
    }
}
