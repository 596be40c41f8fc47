//! Takes a command's arguments apart, and says in QEMU's words what is missing, mistyped or unexpected.

use serde_json::{Map, Value};

use super::refusal::Refusal;

/// The members of an object that have not been taken yet.
#[derive(Debug)]
pub struct Arguments {
    /// What stands before a member's name in an error: `channels[0].addr.`, or nothing at the top.
    path: String,
    members: Map<String, Value>,
}

impl Arguments {
    /// A command's arguments.
    #[must_use]
    pub const fn new(members: Map<String, Value>) -> Self {
        Self { path: String::new(), members }
    }

    /// What has not been taken, as JSON.
    #[must_use]
    pub fn to_json(&self) -> String {
        serde_json::to_string(&self.members).unwrap_or_default()
    }

    /// A member that may be absent.
    ///
    /// # Errors
    /// When it is of another type.
    pub fn optional<T: Kind>(&mut self, name: &str) -> Result<Option<T>, Refusal> {
        let Some(value) = self.members.remove(name) else { return Ok(None) };
        let path = format!("{}{name}", self.path);
        T::of(value, &path)
            .map(Some)
            .ok_or_else(|| Refusal::generic(format_args!("Invalid parameter type for '{path}', expected: {}", T::NAME)))
    }

    /// A member that must be there.
    ///
    /// # Errors
    /// When it is not, or is of another type.
    pub fn required<T: Kind>(&mut self, name: &str) -> Result<T, Refusal> {
        self.optional(name)?.ok_or_else(|| Refusal::generic(format_args!("Parameter '{}{name}' is missing", self.path)))
    }

    /// Whether a member is there that has not been taken.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.members.contains_key(name)
    }

    /// All members that are left.
    #[must_use]
    pub fn rest(self) -> Map<String, Value> {
        self.members
    }

    /// Ends the taking apart.
    ///
    /// # Errors
    /// When there is a member that nobody took.
    pub fn finish(self) -> Result<(), Refusal> {
        match self.members.keys().next() {
            None => Ok(()),
            Some(name) => Err(Refusal::generic(format_args!("Parameter '{}{name}' is unexpected", self.path))),
        }
    }
}

/// A type that an argument can have.
pub trait Kind: Sized {
    /// Its name in QEMU's errors.
    const NAME: &'static str;

    /// `value`, which stands at `path`, as this type; `None` when it is of another.
    fn of(value: Value, path: &str) -> Option<Self>;
}

impl Kind for String {
    const NAME: &'static str = "string";

    fn of(value: Value, _: &str) -> Option<Self> {
        if let Value::String(text) = value { Some(text) } else { None }
    }
}

impl Kind for bool {
    const NAME: &'static str = "boolean";

    fn of(value: Value, _: &str) -> Option<Self> {
        value.as_bool()
    }
}

impl Kind for i64 {
    const NAME: &'static str = "integer";

    fn of(value: Value, _: &str) -> Option<Self> {
        value.as_i64()
    }
}

impl Kind for u64 {
    const NAME: &'static str = "uint64";

    fn of(value: Value, _: &str) -> Option<Self> {
        value.as_u64()
    }
}

impl Kind for Arguments {
    const NAME: &'static str = "object";

    fn of(value: Value, path: &str) -> Option<Self> {
        if let Value::Object(members) = value { Some(Self { path: format!("{path}."), members }) } else { None }
    }
}

impl Kind for Vec<Value> {
    const NAME: &'static str = "array";

    fn of(value: Value, _: &str) -> Option<Self> {
        if let Value::Array(elements) = value { Some(elements) } else { None }
    }
}

/// The objects of the array `elements`, which is the argument called `name`.
///
/// # Errors
/// When one of them is no object.
pub fn objects(name: &str, elements: Vec<Value>) -> Result<Vec<Arguments>, Refusal> {
    let each = |(index, element)| {
        let path = format!("{name}[{index}]");
        Arguments::of(element, &path)
            .ok_or_else(|| Refusal::generic(format_args!("Invalid parameter type for '{path}', expected: object")))
    };
    elements.into_iter().enumerate().map(each).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn arguments(value: &Value) -> Arguments {
        Arguments::new(value.as_object().unwrap().clone())
    }

    #[test]
    fn what_is_there_is_taken() {
        let mut all = arguments(&json!({"a": "x", "b": true, "c": [{"d": "y"}]}));
        assert_eq!(all.required::<String>("a").unwrap(), "x");
        assert_eq!(all.optional::<bool>("b").unwrap(), Some(true));
        assert_eq!(all.optional::<bool>("z").unwrap(), None);
        let elements = objects("c", all.required("c").unwrap()).unwrap();
        for mut element in elements {
            assert_eq!(element.required::<String>("d").unwrap(), "y");
            element.finish().unwrap();
        }
        all.finish().unwrap();
    }

    #[test]
    fn what_is_wrong_is_named_as_qemu_names_it() {
        let desc = |refusal: Refusal| refusal.desc;
        let mut all = arguments(&json!({"uri": 5, "channels": [{"addr": {"port": 1}}, 7], "x": 1}));
        assert_eq!(
            desc(all.required::<String>("uri").unwrap_err()),
            "Invalid parameter type for 'uri', expected: string"
        );
        assert_eq!(desc(all.required::<String>("host").unwrap_err()), "Parameter 'host' is missing");
        let elements: Vec<Value> = all.required("channels").unwrap();
        assert_eq!(
            desc(objects("channels", elements.clone()).unwrap_err()),
            "Invalid parameter type for 'channels[1]', expected: object"
        );
        let mut first = objects("channels", elements[..1].to_vec()).unwrap().remove(0);
        assert_eq!(desc(first.required::<String>("type").unwrap_err()), "Parameter 'channels[0].type' is missing");
        let mut inner: Arguments = first.required("addr").unwrap();
        assert_eq!(
            desc(inner.required::<String>("port").unwrap_err()),
            "Invalid parameter type for 'channels[0].addr.port', expected: string"
        );
        assert_eq!(desc(all.finish().unwrap_err()), "Parameter 'x' is unexpected");
    }
}
