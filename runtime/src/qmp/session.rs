//! One client's conversation, apart from its socket: values in, replies out.

use serde_json::{Map, Value, json};

use super::arguments::Arguments;
use super::commands::{self, Commands};
use super::framing::InputError;
use super::refusal::Refusal;

/// A conversation. It begins in negotiation, where only `qmp_capabilities` is understood.
#[derive(Debug, Default)]
pub struct Session {
    negotiated: bool,
}

/// The answer to one value of input.
#[derive(Clone, PartialEq, Debug)]
pub struct Answer {
    /// What to send.
    pub reply: Value,
    /// What to do when it has been sent.
    pub then: Then,
}

/// What follows a reply.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Then {
    /// The next command.
    GoOn,
    /// Negotiation is over: from now on the client is told events.
    TellEvents,
    /// The end of the machine.
    Quit,
}

/// What the server says before anything else.
#[must_use]
pub fn greeting() -> Value {
    json!({ "QMP": { "version": commands::version(), "capabilities": [] } })
}

impl Session {
    /// Answers one value of input. The `id` of a command is part of its reply, whatever becomes of it.
    pub fn answer(&mut self, commands: &Commands, input: Result<Value, InputError>) -> Answer {
        let mut id = None;
        let (outcome, then) = match self.carry_out(commands, input, &mut id) {
            Ok((value, then)) => (("return", value), then),
            Err(refusal) => (("error", refusal.to_value()), Then::GoOn),
        };
        let mut reply = Map::new();
        reply.insert(outcome.0.to_owned(), outcome.1);
        if let Some(id) = id {
            reply.insert("id".to_owned(), id);
        }
        Answer { reply: Value::Object(reply), then }
    }

    fn carry_out(
        &mut self,
        commands: &Commands,
        input: Result<Value, InputError>,
        id: &mut Option<Value>,
    ) -> Result<(Value, Then), Refusal> {
        let Value::Object(mut members) = input.map_err(Refusal::generic)? else {
            return Err(Refusal::generic("QMP input must be a JSON object"));
        };
        *id = members.remove("id");
        let name = match members.remove("execute") {
            Some(Value::String(name)) => name,
            Some(_) => return Err(Refusal::generic("QMP input member 'execute' must be a string")),
            None => return Err(unexpected(&members, "QMP input lacks member 'execute'")),
        };
        let arguments = match members.remove("arguments") {
            Some(Value::Object(arguments)) => arguments,
            Some(_) => return Err(Refusal::generic("QMP input member 'arguments' must be an object")),
            None => Map::new(),
        };
        if !members.is_empty() {
            return Err(unexpected(&members, ""));
        }
        let arguments = Arguments::new(arguments);
        match (self.negotiated, name.as_str()) {
            (false, "qmp_capabilities") => {
                negotiate(arguments)?;
                self.negotiated = true;
                Ok((json!({}), Then::TellEvents))
            }
            (false, _) => Err(Refusal::not_found("Expecting capabilities negotiation with 'qmp_capabilities'")),
            (true, "quit") => commands.execute(&name, arguments).map(|value| (value, Then::Quit)),
            (true, _) => commands.execute(&name, arguments).map(|value| (value, Then::GoOn)),
        }
    }
}

/// The refusal of an envelope that has a member too many, or else the sentence `otherwise`.
fn unexpected(members: &Map<String, Value>, otherwise: &str) -> Refusal {
    match members.keys().find(|name| *name != "arguments") {
        Some(name) => Refusal::generic(format_args!("QMP input member '{name}' is unexpected")),
        None => Refusal::generic(otherwise),
    }
}

fn negotiate(mut arguments: Arguments) -> Result<(), Refusal> {
    let enable: Vec<Value> = arguments.optional("enable")?.unwrap_or_default();
    arguments.finish()?;
    match enable.first() {
        None => Ok(()),
        Some(first) => {
            Err(Refusal::generic(format_args!("The QMP capability {first} was not offered in the greeting")))
        }
    }
}
