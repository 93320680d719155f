//! Metadata values, lossless: strings are kept as the bytes they are.
//!
//! An accessor's error is a phrase that continues "`key` is": what the value is instead.

/// One metadata value, any of the thirteen types that GGUF has.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// u8, type 0.
    U8(u8),
    /// i8, type 1.
    I8(i8),
    /// u16, type 2.
    U16(u16),
    /// i16, type 3.
    I16(i16),
    /// u32, type 4.
    U32(u32),
    /// i32, type 5.
    I32(i32),
    /// f32, type 6.
    F32(f32),
    /// A byte that is 0 or 1, type 7.
    Bool(bool),
    /// Bytes that should be UTF-8, type 8.
    String(Vec<u8>),
    /// Values of one type, type 9.
    Array(Array),
    /// u64, type 10.
    U64(u64),
    /// i64, type 11.
    I64(i64),
    /// f64, type 12.
    F64(f64),
}

/// An array value; its elements all have one type.
#[derive(Debug, Clone, PartialEq)]
pub enum Array {
    /// Elements of type u8.
    U8(Vec<u8>),
    /// Elements of type i8.
    I8(Vec<i8>),
    /// Elements of type u16.
    U16(Vec<u16>),
    /// Elements of type i16.
    I16(Vec<i16>),
    /// Elements of type u32.
    U32(Vec<u32>),
    /// Elements of type i32.
    I32(Vec<i32>),
    /// Elements of type f32.
    F32(Vec<f32>),
    /// Elements of type bool.
    Bool(Vec<bool>),
    /// Elements of type string.
    String(Vec<Vec<u8>>),
    /// Elements that are arrays themselves.
    Array(Vec<Array>),
    /// Elements of type u64.
    U64(Vec<u64>),
    /// Elements of type i64.
    I64(Vec<i64>),
    /// Elements of type f64.
    F64(Vec<f64>),
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::String(text.as_bytes().to_vec())
    }
}

impl Value {
    /// The number GGUF gives the type.
    pub(super) fn type_id(&self) -> u32 {
        match self {
            Self::U8(_) => 0,
            Self::I8(_) => 1,
            Self::U16(_) => 2,
            Self::I16(_) => 3,
            Self::U32(_) => 4,
            Self::I32(_) => 5,
            Self::F32(_) => 6,
            Self::Bool(_) => 7,
            Self::String(_) => 8,
            Self::Array(_) => 9,
            Self::U64(_) => 10,
            Self::I64(_) => 11,
            Self::F64(_) => 12,
        }
    }

    /// The type in words, with the value where it is a number.
    pub(super) fn describe(&self) -> String {
        match self {
            Self::U8(value) => format!("the u8 {value}"),
            Self::I8(value) => format!("the i8 {value}"),
            Self::U16(value) => format!("the u16 {value}"),
            Self::I16(value) => format!("the i16 {value}"),
            Self::U32(value) => format!("the u32 {value}"),
            Self::I32(value) => format!("the i32 {value}"),
            Self::U64(value) => format!("the u64 {value}"),
            Self::I64(value) => format!("the i64 {value}"),
            Self::F32(value) => format!("the f32 {value}"),
            Self::F64(value) => format!("the f64 {value}"),
            Self::Bool(value) => format!("the bool {value}"),
            Self::String(_) => "a string".to_owned(),
            Self::Array(array) => format!("an array of {} {}", array.len(), array.element_name()),
        }
    }

    /// The text.
    ///
    /// # Errors
    /// Where the value is no string, or not UTF-8.
    pub fn as_str(&self) -> Result<&str, String> {
        let Self::String(bytes) = self else { return Err(self.is_not("a string")) };
        std::str::from_utf8(bytes)
            .map_err(|error| format!("a string that is not UTF-8 after {} of its bytes", error.valid_up_to()))
    }

    /// The integer, of whatever width it is stored in.
    ///
    /// # Errors
    /// Where the value is no integer.
    pub fn as_integer(&self) -> Result<i128, String> {
        Ok(match *self {
            Self::U8(value) => value.into(),
            Self::I8(value) => value.into(),
            Self::U16(value) => value.into(),
            Self::I16(value) => value.into(),
            Self::U32(value) => value.into(),
            Self::I32(value) => value.into(),
            Self::U64(value) => value.into(),
            Self::I64(value) => value.into(),
            Self::F32(_) | Self::F64(_) | Self::Bool(_) | Self::String(_) | Self::Array(_) => {
                return Err(self.is_not("an integer"));
            }
        })
    }

    /// The number, where it is stored as f32 or f64.
    ///
    /// # Errors
    /// Where the value is no floating-point number.
    pub fn as_f32(&self) -> Result<f32, String> {
        match *self {
            Self::F32(value) => Ok(value),
            Self::F64(value) => Ok(value as f32),
            _ => Err(self.is_not("a floating-point number")),
        }
    }

    /// The bool.
    ///
    /// # Errors
    /// Where the value is no bool.
    pub fn as_bool(&self) -> Result<bool, String> {
        let Self::Bool(value) = *self else { return Err(self.is_not("a bool")) };
        Ok(value)
    }

    /// The array.
    ///
    /// # Errors
    /// Where the value is no array.
    pub fn as_array(&self) -> Result<&Array, String> {
        let Self::Array(array) = self else { return Err(self.is_not("an array")) };
        Ok(array)
    }

    fn is_not(&self, wanted: &str) -> String {
        format!("{}, must be {wanted}", self.describe())
    }
}

impl Array {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::U8(values) => values.len(),
            Self::I8(values) => values.len(),
            Self::U16(values) => values.len(),
            Self::I16(values) => values.len(),
            Self::U32(values) => values.len(),
            Self::I32(values) => values.len(),
            Self::F32(values) => values.len(),
            Self::Bool(values) => values.len(),
            Self::String(values) => values.len(),
            Self::Array(values) => values.len(),
            Self::U64(values) => values.len(),
            Self::I64(values) => values.len(),
            Self::F64(values) => values.len(),
        }
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The number GGUF gives the elements' type.
    pub(super) fn element_type_id(&self) -> u32 {
        match self {
            Self::U8(_) => 0,
            Self::I8(_) => 1,
            Self::U16(_) => 2,
            Self::I16(_) => 3,
            Self::U32(_) => 4,
            Self::I32(_) => 5,
            Self::F32(_) => 6,
            Self::Bool(_) => 7,
            Self::String(_) => 8,
            Self::Array(_) => 9,
            Self::U64(_) => 10,
            Self::I64(_) => 11,
            Self::F64(_) => 12,
        }
    }

    fn element_name(&self) -> &'static str {
        match self {
            Self::U8(_) => "u8",
            Self::I8(_) => "i8",
            Self::U16(_) => "u16",
            Self::I16(_) => "i16",
            Self::U32(_) => "u32",
            Self::I32(_) => "i32",
            Self::F32(_) => "f32",
            Self::Bool(_) => "bool",
            Self::String(_) => "strings",
            Self::Array(_) => "arrays",
            Self::U64(_) => "u64",
            Self::I64(_) => "i64",
            Self::F64(_) => "f64",
        }
    }

    /// The texts, in order.
    ///
    /// # Errors
    /// Where an element is no string, or not UTF-8.
    pub fn as_strings(&self) -> Result<Vec<&str>, String> {
        let Self::String(strings) = self else { return Err(self.is_not("strings")) };
        let texts = strings.iter().enumerate().map(|(index, bytes)| {
            std::str::from_utf8(bytes).map_err(|_| format!("an array whose element {index} is not UTF-8"))
        });
        texts.collect()
    }

    /// The integers, of whatever width they are stored in.
    ///
    /// # Errors
    /// Where the elements are no integers that fit `T`.
    pub fn as_integers<T: TryFrom<i128>>(&self) -> Result<Vec<T>, String> {
        fn convert<S: Copy + Into<i128>, T: TryFrom<i128>>(values: &[S]) -> Result<Vec<T>, String> {
            let converted = values.iter().map(|&value| {
                let value: i128 = value.into();
                T::try_from(value).map_err(|_| format!("an array with the element {value} out of range"))
            });
            converted.collect()
        }
        match self {
            Self::U8(values) => convert(values),
            Self::I8(values) => convert(values),
            Self::U16(values) => convert(values),
            Self::I16(values) => convert(values),
            Self::U32(values) => convert(values),
            Self::I32(values) => convert(values),
            Self::U64(values) => convert(values),
            Self::I64(values) => convert(values),
            Self::F32(_) | Self::F64(_) | Self::Bool(_) | Self::String(_) | Self::Array(_) => {
                Err(self.is_not("integers"))
            }
        }
    }

    /// The numbers, where they are stored as f32 or f64.
    ///
    /// # Errors
    /// Where the elements are no floating-point numbers.
    pub fn as_f32s(&self) -> Result<Vec<f32>, String> {
        match self {
            Self::F32(values) => Ok(values.clone()),
            Self::F64(values) => Ok(values.iter().map(|&value| value as f32).collect()),
            _ => Err(self.is_not("floating-point numbers")),
        }
    }

    fn is_not(&self, wanted: &str) -> String {
        format!("an array of {} {}, must be one of {wanted}", self.len(), self.element_name())
    }
}
